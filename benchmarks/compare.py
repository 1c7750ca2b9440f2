#!/usr/bin/env python
r"""Compares the losses on the Shapes data: equal budgets, equal seeds, equally searched weights.

    python benchmarks/compare.py                                # every loss, as `make compare` does
    python benchmarks/compare.py --methods vanilla ssim l2 --seeds 1 2 3 --budget 500
    python benchmarks/compare.py --ablation window sigma        # variants of ssim, one change each
    python benchmarks/compare.py --methods ssim ssim:SSIM.BORDER=zero:WARMUP_ITERS=100 "ssim:*0.5"
    python benchmarks/compare.py --jobs 4 -- MODEL.DEVICE cuda  # overrides for every run

Run it again after an interruption: finished runs are not repeated. With --records
docs/comparison/records.json, the runs that this project has published are not repeated either.

Every student but vanilla starts with its teacher's heads (configs/shapes/compare.yaml); ssim:*0 is
that alone, without distillation. A weight is searched by factors of four around the one whose
gradient at the maps is nearest to RATIO times the detector's (short runs with the default weight
tell it), further where the best lies at the edge, at the shortest budget on a fifth of the training
images that the search's students do not see. Variants that --ablation names take the weight of
ssim. Differences are taken to ssim, or where it is left out to the first of --methods. In --out:
table.md, table.csv (a row per budget and method), runs.csv (a row per run), weights.json, plot.png,
records.json (every finished run, for --records).
"""

import argparse
import json
import math
import os
import re
import shlex
import sys
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Mapping, Optional, Sequence

import compare_report as report
from compare_methods import (
    ABLATIONS,
    DISTILLED,
    HEADS,
    PLAIN,
    REFERENCE,
    ROOT,
    VANILLA,
    Method,
    default_weight,
    parse_method,
)
from compare_runs import COSTS, Run, Runner, gather, restore
from detectron2.data import DatasetCatalog
from ssimkd import KD_LOSS_REGISTRY
from ssimkd.engine.arguments import load_config
from ssimkd.errors import exit_in_one_line

STEP, MOST_WEIGHTS = 4.0, 8  # of the search: from one weight to the next, and how many at most
RATIO = 8.0  # of the gradients, as in `ssimkd weight`
PROBE_ITERS = 100
PROBE = (
    *("MODEL.DISTILL.LOG_GRADIENTS", "10"),
    *("MODEL.DISTILL.ICD.DETACH_ITERS", "0"),  # it pulls at nothing before
)
SEARCH_DATA = (
    "DATASETS.TRAIN", "('ssimkd_shapes_search_train',)",
    "DATASETS.TEST", "('ssimkd_shapes_search_val',)",
)  # fmt: skip
NO_EVALUATION = ("DATASETS.TEST", "()")


def best(scores: Dict[float, float]) -> float:
    """The weight of the highest score, of equals the one tried first."""
    return max(scores, key=lambda weight: scores[weight])


def next_weights(scores: Dict[float, float]) -> List[float]:
    """What to try after weight -> score: the neighbour of a best weight that is an edge."""
    chosen = best(scores)
    if len(scores) >= MOST_WEIGHTS or scores[chosen] == -math.inf:
        return []
    if chosen == max(scores):
        return [chosen * STEP]
    return [chosen / STEP] if chosen == min(scores) else []


class Comparison:
    """The runs of a comparison; `runner.failed` has those that failed.

    Args:
        args (Namespace): of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.runner = args, Runner()

    def plan(
        self, kind: str, method: Method, weight: float, iters: int, seed: int, opts: Sequence[str]
    ) -> Run:
        """A run in `<out>/<kind>/<method>-w<weight>/seed<seed>`; its schedule ends at `iters`."""
        name, config = method.name, VANILLA
        settings = ["SEED", seed, "SOLVER.MAX_ITER", iters, "SOLVER.WARMUP_ITERS", iters // 10]
        last_quarter, last_tenth = iters - max(2, iters // 4), iters - max(1, iters // 10)
        settings += ["SOLVER.STEPS", (last_quarter, last_tenth)]
        if method.loss:
            name, config = f"{method.name}-w{weight:g}", DISTILLED
            settings += ["MODEL.DISTILL.LOSSES", (method.loss,), *method.opts]
            settings += [f"MODEL.DISTILL.{method.loss.upper()}.WEIGHT", weight]
        folder = Path(self.args.out).resolve() / kind / re.sub(r"[^\w.=-]+", "_", name)
        return Run(folder / f"seed{seed}", config, (*map(str, settings), *opts, *self.args.opts))

    def probe(self, methods: Sequence[Method]) -> Dict[str, float]:
        """Method's name -> where its search starts: its default times a power of STEP."""
        seed, opts = self.args.search_seeds[0], (*SEARCH_DATA[:2], *NO_EVALUATION, *PROBE)
        runs = {
            method: self.plan("probe", method, default_weight(method.loss), PROBE_ITERS, seed, opts)
            for method in methods
        }
        self.runner.finish(runs.values(), "probe", self.args.jobs)
        centres = {}
        for method, run in runs.items():
            ratio = (run.record() or {}).get("gradient_ratio")
            power = round(math.log(RATIO / ratio, STEP)) if ratio else 0
            centres[method.name] = default_weight(method.loss) * STEP**power
        return centres

    def search(
        self, methods: Sequence[Method], centres: Mapping[str, float]
    ) -> Dict[str, Dict[float, float]]:
        """Method's name -> weight -> AP on the held-out images, -inf where a run failed."""
        iters, seeds = min(self.args.budget), self.args.search_seeds
        scores: Dict[str, Dict[float, float]] = {}
        todo = {}
        for method in methods:
            weight = centres[method.name]
            todo[method] = [weight, weight / STEP, weight * STEP]
        while any(todo.values()):
            runs = {
                (method, weight): [
                    self.plan(f"search{iters}", method, weight, iters, seed, SEARCH_DATA)
                    for seed in seeds
                ]
                for method, weights in todo.items()
                for weight in weights
            }
            self.runner.finish(chain(*runs.values()), "search", self.args.jobs)
            for (method, weight), of_seeds in runs.items():
                records = [run.record() for run in of_seeds]
                found = [metrics_of(record)["AP"] for record in records if record]
                complete = len(found) == len(seeds)
                scores.setdefault(method.name, {})[weight] = mean(found) if complete else -math.inf
            todo = {method: next_weights(scores[method.name]) for method in methods}
        return scores

    def compare(self, weights: Dict[Method, float]) -> List[Dict[str, Any]]:
        """A row per finished run; see compare_report.py."""
        runs = {
            (budget, seed, method): self.plan(str(budget), method, weight, budget, seed, ())
            for budget in self.args.budget
            for seed in self.args.seeds
            for method, weight in weights.items()
        }
        self.runner.finish(runs.values(), "compare", self.args.jobs)
        rows = []
        for (budget, seed, method), run in runs.items():
            record = run.record()
            if record:
                row = {"budget": budget, "method": method.name, "weight": weights[method]}
                rows.append({**row, "seed": seed, **metrics_of(record), **origin_of(record)})
        return rows

    def measure(self, weights: Dict[Method, float]) -> List[Dict[str, Any]]:
        """A row per solo run, one at a time and the methods in turn, so that all share a drift."""
        iters = self.args.timing_iters
        runs = {
            (turn, method): self.plan(COSTS, method, weight, iters, turn, NO_EVALUATION)
            for turn in range(1, self.args.timing_rounds + 1)
            for method, weight in weights.items()
        }
        self.runner.finish(runs.values(), "costs", jobs=1)
        rows = []
        for (turn, method), run in runs.items():
            record = run.record()
            if record:
                cost = {key: record[key] for key in ("seconds", "peak_mib")}
                rows.append({"method": method.name, "round": turn, **cost, **origin_of(record)})
        return rows


def metrics_of(record: Dict[str, Any]) -> Dict[str, float]:
    """AP, AP50 and AP75 in percent; Detectron2 has no number where nothing was detected."""
    return {metric: record["bbox"][metric] or 0.0 for metric in report.METRICS}


def origin_of(record: Dict[str, Any]) -> Dict[str, str]:
    """The code and the machine that a run's numbers come from."""
    return {key: record[key] for key in ("commit", "machine")}


def fits(loss: type) -> bool:
    """Whether the student, a Faster R-CNN, has what a loss compares with its defaults."""
    return bool({"maps", "rpn", "roi"} & set(loss().compares))


def select(args: argparse.Namespace) -> List[Method]:
    """The methods of the command line.

    Raises:
        ConfigError: there is no such method.
    """
    every = [PLAIN, HEADS, *sorted(name for name, cls in KD_LOSS_REGISTRY if fits(cls))]
    names = args.methods or ([PLAIN, REFERENCE] if args.ablation else every)
    methods = [parse_method(name) for name in names]
    for group in args.ablation:
        methods += [
            parse_method(f"{REFERENCE}:{change}", searched_as=REFERENCE)
            for change in ABLATIONS[group]
        ]
    return list({method.name: method for method in methods}.values())


def choose(methods: Sequence[Method], scores: Dict[str, Dict[float, float]]) -> Dict[Method, float]:
    """Every method's weight; one whose search has failed altogether is left out."""
    weights = {}
    for method in methods:
        found = scores.get(method.searched_as)
        if not method.loss:
            weights[method] = 0.0
        elif found is None:  # there was no search
            weights[method] = method.factor * default_weight(method.loss)
        elif max(found.values()) > -math.inf:
            weights[method] = method.factor * best(found)
    return weights


def write_report(
    out: Path, rows: List[Dict[str, Any]], solo: List[Dict[str, Any]], searched: str
) -> str:
    """Writes all files but weights.json; returns the text of table.md."""
    table = report.summarise(rows, solo)
    text = []
    for budget in sorted({row["budget"] for row in rows}):
        part = [row for row in table if row["budget"] == budget]
        text += [f"### {budget} iterations", report.markdown(part), report.verdict(part)]
    text.append(
        "AP: box AP in percent on ssimkd_shapes_val, mean +- sample standard deviation over seeds. "
        f"Differences to {table[0]['reference']} are paired by seed; each 95 % interval "
        "(Student's t) is that of one comparison. Seconds per iteration (one thread, data "
        "included) and peak memory (of the process; of the GPU where one is used) are medians of "
        "solo runs."
    )
    text += [searched] if searched else []
    command = shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]])
    code, where = (
        " and ".join(sorted({row[key] for row in [*rows, *solo]})) for key in ("commit", "machine")
    )
    text.append(f"`{command}`, commit {code}, on {where}")
    (out / "table.md").write_text("\n\n".join(text) + "\n")
    report.write_csv(out / "table.csv", table)
    report.write_csv(out / "runs.csv", rows)
    report.plot(rows, out / "plot.png")
    return "\n\n".join(text)


def write_weights(path: Path, scores: Dict[str, Dict[float, float]]) -> str:
    """Writes the search's outcome as JSON; returns it as a Markdown list."""
    lines = ["Weights tried, with AP on the held-out images (bold: chosen):", ""]
    content = {}
    for name, found in scores.items():
        tried = {
            f"{weight:g}": None if ap == -math.inf else ap for weight, ap in sorted(found.items())
        }
        content[name] = {"weight": best(found), "AP": tried}
        cells = {w: f"{w}: failed" if ap is None else f"{w}: {ap:.1f}" for w, ap in tried.items()}
        chosen = f"{best(found):g}"
        cells[chosen] = f"**{cells[chosen]}**"
        lines.append(f"- {name}: {', '.join(cells.values())}")
    path.write_text(json.dumps(content, indent=2) + "\n")
    return "\n".join(lines) if scores else ""


def parse_args(words: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=[], help="LOSS[:KEY=VALUE|:*FACTOR]... or vanilla")
    add("--ablation", nargs="+", default=[], choices=ABLATIONS, help="variants of ssim")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="shared by all methods")
    add("--budget", type=int, nargs="+", default=[500], help="iterations; one table for each")
    add("--search-seeds", type=int, nargs="*", default=[101], help="none: default weights")
    add("--jobs", type=int, default=os.cpu_count(), help="processes at a time, a thread each")
    add("--out", default=str(ROOT / "output/compare"), help="folder of runs and report")
    add("--records", type=Path, help="finished runs to take over: a records.json")
    add("--timing-rounds", type=int, default=3, help="solo runs of each method; 0: no costs")
    add("--timing-iters", type=int, default=60, help="iterations of a solo run")
    add("opts", nargs="*", help="-- and overrides for every run")
    return parser.parse_args(words)


def main() -> None:
    """Command line of this script."""
    args = parse_args()
    with exit_in_one_line():
        load_config(str(ROOT / VANILLA), args.opts)
        methods = select(args)
        DatasetCatalog.get("ssimkd_shapes_val")  # drawn once, not by several processes
        comparison, out = Comparison(args), Path(args.out).resolve()
        if args.records:
            restore(args.records, out)
        names = dict.fromkeys(method.searched_as for method in methods if method.loss)
        searched = [parse_method(n) for n in names if args.search_seeds]
        scores = comparison.search(searched, comparison.probe(searched)) if searched else {}
        weights = choose(methods, scores)
        rows = comparison.compare(weights)
        gather(out)
        if rows:
            found = write_weights(out / "weights.json", scores)
            print(write_report(out, rows, comparison.measure(weights), found))
    if comparison.runner.failed:
        sys.exit(f"{len(comparison.runner.failed)} runs failed and are tried again next time")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
