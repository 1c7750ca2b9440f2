"""Statistics, tables and the plot of compare.py.

A row is a dict. The row of a run has budget, method, weight, seed, data, AP, AP50, AP75 and `parts`
(AP by size of the objects and by class). The row of a timed run has method, round, seconds (per
iteration) and peak_mib.
"""

import math
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from compare_methods import PLAIN, REFERENCE
from matplotlib.figure import Figure
from scipy.stats import t
from ssimkd.utils import measure

Row = Dict[str, Any]
METRICS = ("AP", "AP50", "AP75")
COSTS = ("seconds", "peak_mib")
HEAD = (
    "method", "weight", "seeds", *METRICS,
    "AP minus {reference}'s: mean, standard error [95 % interval]",
    "s/iteration", f"of {PLAIN}'s", "peak MiB", f"of {PLAIN}'s",
)  # fmt: skip


class Difference(NamedTuple):
    """Mean of paired differences with its standard error and 95 % interval."""

    mean: float
    error: float
    low: float
    high: float


def paired(ours: Mapping[int, float], others: Mapping[int, float]) -> Optional[Difference]:
    """Difference of two methods (seed -> value) over the seeds of both; None below two seeds."""
    values = [ours[seed] - others[seed] for seed in ours if seed in others]
    if len(values) < 2:
        return None
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return Difference(mean, error, mean - half, mean + half)


def costs(solo: Sequence[Row]) -> Dict[str, Row]:
    """Method -> medians over its timed runs, and their ratios to the plain student's."""
    medians: Dict[str, Row] = {}
    for method in dict.fromkeys(row["method"] for row in solo):
        rows = [row for row in solo if row["method"] == method]
        medians[method] = {key: statistics.median(row[key] for row in rows) for key in COSTS}
    plain = medians.get(PLAIN)
    if plain:
        for cost in medians.values():
            cost.update({f"{key}_ratio": cost[key] / plain[key] for key in COSTS})
    return medians


def summarise(runs: Sequence[Row], solo: Sequence[Row]) -> List[Row]:
    """A row for each method of one budget and data set. The best mean AP comes first."""
    methods = [row["method"] for row in runs]
    reference = REFERENCE if REFERENCE in methods else methods[0]
    samples: Dict[str, Dict[int, Row]] = defaultdict(dict)
    for row in runs:
        samples[row["method"]][row["seed"]] = row
    table, cost = [], costs(solo)
    for method, by_seed in samples.items():
        line: Row = {"method": method, "seeds": len(by_seed), "reference": reference}
        line["weight"] = next(iter(by_seed.values()))["weight"]
        line["mean_ap"] = statistics.mean(row["AP"] for row in by_seed.values())
        for metric in METRICS:
            line[metric] = measure.mean_and_deviation([row[metric] for row in by_seed.values()])
        ours, others = (
            {seed: row["AP"] for seed, row in samples[name].items()} for name in (method, reference)
        )
        difference = paired(ours, others)
        if difference and method != reference:
            line.update({f"difference_{k}": v for k, v in difference._asdict().items()})
        table.append({**line, **cost.get(method, {})})
    return sorted(table, key=lambda line: -line["mean_ap"])


def markdown(table: Sequence[Row]) -> str:
    """The rows of one budget as a table in Markdown. A dash means that nothing was measured."""
    rows = []
    for row in table:
        cells = [row["method"], f"{row['weight']:g}", str(row["seeds"])]
        cells += [row[metric] for metric in METRICS]
        for form in (
            "{difference_mean:+.1f}, {difference_error:.1f} "
            "[{difference_low:+.1f}, {difference_high:+.1f}]",
            "{seconds:.3f}", "{seconds_ratio:.2f}", "{peak_mib:.0f}", "{peak_mib_ratio:.2f}",
        ):  # fmt: skip
            try:
                cells.append(form.format(**row))
            except KeyError:
                cells.append("-")
        rows.append(cells)
    head = [text.format(reference=table[0]["reference"]) for text in HEAD]
    return measure.markdown(head, rows)


def by_size_and_class(runs: Sequence[Row], methods: Sequence[str]) -> str:
    """AP by size of the objects (APs, APm, APl) and by class as a table in Markdown.

    A run that detected nothing has no numbers, which count as 0. A size that no object has is left
    out.
    """
    parts = [(part, ap) for row in runs for part, ap in row["parts"].items()]
    columns = [*dict.fromkeys(part for part, ap in parts if ap is not None)]
    rows = []
    for method in methods:
        cells = [method]
        for part in columns:
            aps = [row["parts"].get(part) or 0.0 for row in runs if row["method"] == method]
            cells.append(measure.mean_and_deviation(aps))
        rows.append(cells)
    return measure.markdown(["method", *columns], rows)


def origin(rows: Sequence[Row]) -> str:
    """The command, the commits and the machines of rows as one line."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    code, where = (
        " and ".join(sorted({row[key] for row in rows})) for key in ("commit", "machine")
    )
    return f"`{command}`, commit {code}, on {where}"


def plot(runs: Sequence[Row], path: Path) -> None:
    """Draws a dot for each seed and a bar at each mean. The best method is on top."""
    samples: Dict[Any, List[float]] = defaultdict(list)
    for row in runs:
        samples[row["method"], row["budget"]].append(row["AP"])
    means = {key: statistics.mean(values) for key, values in samples.items()}
    budgets = sorted({budget for _, budget in samples})
    methods = sorted(
        {method for method, _ in samples},
        key=lambda method: [means.get((method, budget), -1.0) for budget in reversed(budgets)],
    )
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for (method, budget), values in samples.items():
        index = budgets.index(budget)
        height = methods.index(method) + 0.3 * (index - (len(budgets) - 1) / 2)
        axes.plot(values, [height] * len(values), "o", color=f"C{index}", alpha=0.6, ms=5)
        axes.plot(means[method, budget], height, "k|", ms=11, mew=1.5)
    for index, budget in enumerate(budgets):
        axes.plot([], "o", color=f"C{index}", label=f"{budget} iterations")
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xlabel("box AP (dot: seed, bar: mean)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
