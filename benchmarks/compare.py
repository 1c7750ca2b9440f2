#!/usr/bin/env python
r"""Compares the losses with equal budgets, seeds and searches of the weight.

    python benchmarks/compare.py                                # every loss, as `make compare` does
    python benchmarks/compare.py --methods vanilla ssim l2 --seeds 1 2 3 --budget 500
    python benchmarks/compare.py --ablation window sigma        # variants of ssim, one change each
    python benchmarks/compare.py --methods ssim ssim:SSIM.BORDER=zero:WARMUP_ITERS=100 "ssim:*0.5"
    python benchmarks/compare.py --methods ssim dist ssim+dist  # two losses at once
    python benchmarks/compare.py --on photos --methods vanilla "vanilla:*1.3" ssim --budget 1200
    python benchmarks/compare.py --on retinanet --methods ssim crosskd ssim+crosskd
    python benchmarks/compare.py --jobs 4 -- MODEL.DEVICE cuda  # overrides for every run

Finished runs are not repeated when the command is started again. With --records FILE, the runs in
this file are not repeated either; docs/comparison has those that this project has published.

The detector is a Faster R-CNN on Shapes, or a RetinaNet on Shapes with --on retinanet, or a Faster
R-CNN on BCCD with --on photos. First train the teacher of the RetinaNet, or get BCCD;
configs/README.md has the commands. On Shapes every student but vanilla starts with its teacher's
heads (configs/shapes/compare.yaml, retinanet_compare.yaml). The method ssim:*0 starts with them and
distils nothing. vanilla:*1.3 trains 1.3 times as long.

Each weight is searched as follows. Short runs with the default weight measure the gradients. The
search starts at the weight whose gradient at the maps is nearest to RATIO times the detector's. It
tries factors of four around it, and goes on while the best weight is at an edge. The students of
the search train for --search-budget iterations. They are evaluated on BCCD's validation images, or
on a fifth of the training images of Shapes, which they do not see. Variants of --ablation take the
weight of ssim. In ssim+dist, ssim has the weight of its own search, and the search of dist starts
at the weight that is best for dist alone. Differences are taken to ssim, or to the first of
--methods if ssim is not among them.

The folder --out then holds table.md, plot.png and records.json (every finished run, for --records).
"""

import argparse
import math
import os
import re
import shutil
import sys
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Mapping, Optional, Sequence

import compare_report as report
from compare_methods import (
    ABLATIONS,
    EXPERIMENTS,
    HEADS,
    PLAIN,
    REFERENCE,
    ROOT,
    Experiment,
    Method,
    default_weight,
    parse_method,
)
from compare_runs import TIMING, Run, Runner, check_teacher, gather, restore, schedule
from detectron2.data import DatasetCatalog
from ssimkd import KD_LOSS_REGISTRY
from ssimkd.engine.arguments import load_config
from ssimkd.errors import ConfigError, exit_in_one_line

STEP, MOST_WEIGHTS = 4.0, 8  # factor between two weights of a search, and most weights to try
RATIO = 8.0  # ratio of the gradients where a search starts
PROBE_ITERS = 100
# icd has no gradient at the maps before its DETACH_ITERS.
PROBE = ("MODEL.DISTILL.LOG_GRADIENTS", "10", "MODEL.DISTILL.ICD.DETACH_ITERS", "0")
NO_EVALUATION = ("DATASETS.TEST", "()")


def best(scores: Dict[float, float]) -> float:
    """The weight of the highest score, and the first of several that are equal."""
    return max(scores, key=lambda weight: scores[weight])


def next_weights(scores: Dict[float, float]) -> List[float]:
    """The weights to try after these (weight -> score): the neighbour of a best one at an edge."""
    chosen = best(scores)
    if len(scores) >= MOST_WEIGHTS or scores[chosen] == -math.inf:
        return []
    if chosen == max(scores):
        return [chosen * STEP]
    return [chosen / STEP] if chosen == min(scores) else []


class Comparison:
    """The runs of a comparison. `runner.failed` has those that failed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.runner, self.on = args, Runner(), EXPERIMENTS[args.on]
        taken = r"SEED|SOLVER\.(MAX_ITER|STEPS|WARMUP_ITERS)|MODEL\.DISTILL\.(LOSSES|\w+\.WEIGHT)"
        for key in args.opts[::2]:
            if re.fullmatch(taken, key):
                raise ConfigError(f"{key} cannot be overridden, because this script sets it")
        self.found: Dict[str, float] = {}  # name of a method -> the weight that its search chose

    def plan(
        self, kind: str, method: Method, weight: float, iters: int, seed: int, opts: Sequence[str]
    ) -> Run:
        """A run of `iters` iterations in `<out>/<kind>/<method>-w<weight>/seed<seed>`."""
        name, config = method.name, self.on.vanilla
        iters = iters if method.loss else round(iters * method.factor)
        settings = ["SEED", seed, *schedule(iters)]
        if method.loss:
            name, config = f"{method.name}-w{weight:g}", self.on.distilled
            weights = {method.loss: weight}
            if method.partner:
                partner = method.partner
                weights = {partner: self.found.get(partner, default_weight(partner)), **weights}
            settings += ["MODEL.DISTILL.LOSSES", tuple(weights), *method.opts]
            for loss, value in weights.items():
                settings += [f"MODEL.DISTILL.{loss.upper()}.WEIGHT", value]
        folder = Path(self.args.out).resolve() / kind / re.sub(r"[^\w.=-]+", "_", name)
        return Run(folder / f"seed{seed}", config, (*map(str, settings), *opts, *self.args.opts))

    def probe(self, methods: Sequence[Method]) -> Dict[str, float]:
        """Name of a method -> the weight where its search starts."""
        seed, opts = self.args.search_seeds[0], (*self.on.search_train, *NO_EVALUATION, *PROBE)
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

    def search_all(self, methods: Sequence[Method]) -> Dict[str, Dict[float, float]]:
        """Searches single losses, then pairs. What a pair needs is searched too. See `search`."""
        parts = [name for m in methods if m.partner for name in (m.partner, m.loss)]
        single = {m.name: m for m in methods if not m.partner}
        single.update({name: parse_method(name) for name in parts})
        scores = self.search([*single.values()], self.probe([*single.values()]))
        self.found = {name: best(found) for name, found in scores.items()}
        pairs = [method for method in methods if method.partner]
        return {**scores, **self.search(pairs, {m.name: self.found[m.loss] for m in pairs})}

    def search(
        self, methods: Sequence[Method], centres: Mapping[str, float]
    ) -> Dict[str, Dict[float, float]]:
        """Name of a method -> weight -> AP on the held-out images, or -inf if a run failed."""
        iters = self.args.search_budget or min(self.args.budget)
        seeds = self.args.search_seeds
        data = (*self.on.search_train, *self.on.search_test)
        scores: Dict[str, Dict[float, float]] = {}
        todo = {}
        for method in methods:
            weight = centres[method.name]
            todo[method] = [weight, weight / STEP, weight * STEP]
        while any(todo.values()):
            runs = {
                (method, weight): [
                    self.plan(f"search{iters}", method, weight, iters, seed, data) for seed in seeds
                ]
                for method, weights in todo.items()
                for weight in weights
            }
            self.runner.finish(chain(*runs.values()), "search", self.args.jobs)
            for (method, weight), of_seeds in runs.items():
                records = [run.record() for run in of_seeds]
                found = [metrics_of(record["bbox"])["AP"] for record in records if record]
                complete = len(found) == len(seeds)
                scores.setdefault(method.name, {})[weight] = mean(found) if complete else -math.inf
            todo = {method: next_weights(scores[method.name]) for method in methods}
        return scores

    def compare(self, weights: Dict[Method, float]) -> List[Dict[str, Any]]:
        """A row for each finished run; see compare_report.py."""
        runs = {
            (budget, seed, method): self.plan(
                str(budget), method, weight, budget, seed, self.on.test
            )
            for budget in self.args.budget
            for seed in self.args.seeds
            for method, weight in weights.items()
        }
        self.runner.finish(runs.values(), "compare", self.args.jobs)
        rows = []
        for (budget, seed, method), run in runs.items():
            record = run.record()
            if not record:
                continue
            row = {"budget": budget, "method": method.name, "weight": weights[method], "seed": seed}
            for data, bbox in record.get("by_dataset", {"": record["bbox"]}).items():
                parts = {key: ap for key, ap in bbox.items() if key not in report.METRICS}
                measured = {"data": data, "parts": parts, **metrics_of(bbox)}
                rows.append({**row, **measured, **origin_of(record)})
        return rows

    def measure(self, weights: Dict[Method, float]) -> List[Dict[str, Any]]:
        """A row for each timed run. Runs are timed one at a time, and the methods take turns."""
        iters = self.args.timing_iters
        runs = {
            (turn, method): self.plan(TIMING, method, weight, iters, turn, NO_EVALUATION)
            for turn in range(1, self.args.timing_rounds + 1)
            for method, weight in weights.items()
        }
        if None in [run.record() for run in runs.values()]:  # then they all take turns again
            for run in runs.values():
                shutil.rmtree(run.folder, ignore_errors=True)
        self.runner.finish(runs.values(), "costs", jobs=1)
        rows = []
        for (turn, method), run in runs.items():
            record = run.record()
            if record:
                cost = {key: record[key] for key in report.COSTS}
                rows.append({"method": method.name, "round": turn, **cost, **origin_of(record)})
        return rows


def metrics_of(bbox: Dict[str, Any]) -> Dict[str, float]:
    """AP, AP50 and AP75 in percent. Detectron2 has no number if nothing was detected."""
    return {metric: bbox[metric] or 0.0 for metric in report.METRICS}


def origin_of(record: Dict[str, Any]) -> Dict[str, str]:
    """The commit and the machine of a run."""
    return {key: record[key] for key in ("commit", "machine")}


def fits(loss: type, on: Experiment) -> bool:
    """Whether the student has something that a loss with default options compares."""
    return bool({"maps", *on.heads} & set(loss().compares))


def select(args: argparse.Namespace) -> List[Method]:
    """The methods of the command line.

    Raises:
        ConfigError: there is no such method, or the student has no head that it compares.
    """
    fitting = sorted(name for name, loss in KD_LOSS_REGISTRY if fits(loss, EXPERIMENTS[args.on]))
    every = [PLAIN, HEADS, *fitting]
    names = args.methods or ([PLAIN, REFERENCE] if args.ablation else every)
    methods = [parse_method(name) for name in names]
    for group in args.ablation:
        methods += [
            parse_method(f"{REFERENCE}:{change}", searched_as=REFERENCE)
            for change in ABLATIONS[group]
        ]
    for method in methods:
        for name in filter(None, (method.partner, method.loss)):
            if not fits(KD_LOSS_REGISTRY.get(name), EXPERIMENTS[args.on]):
                raise ConfigError(
                    f"method {method.name}: {name} compares a head that the student of "
                    f"--on {args.on} does not have"
                )
    return list({method.name: method for method in methods}.values())


def choose(methods: Sequence[Method], scores: Dict[str, Dict[float, float]]) -> Dict[Method, float]:
    """The weight of each method. A method is left out if every run of its search failed."""
    weights = {}
    for method in methods:
        found = scores.get(method.searched_as)
        if not method.loss:
            weights[method] = 0.0
        elif found is None:  # --search-seeds is empty
            weights[method] = method.factor * default_weight(method.loss)
        elif max(found.values()) > -math.inf:
            weights[method] = method.factor * best(found)
    return weights


def write_report(
    out: Path, rows: List[Dict[str, Any]], solo: List[Dict[str, Any]], searched: str
) -> str:
    """Writes table.md and plot.png; returns the text of table.md."""
    text = []
    for budget, data in dict.fromkeys((row["budget"], row["data"]) for row in rows):
        part = [row for row in rows if (row["budget"], row["data"]) == (budget, data)]
        table = report.summarise(part, solo)
        text += [f"### {budget} iterations{data and ', '}{data}", report.markdown(table)]
        text.append(report.by_size_and_class(part, [line["method"] for line in table]))
    text.append(
        "AP is box AP in percent, as mean +- sample standard deviation over seeds. "
        f"Differences to {table[0]['reference']} are paired by seed. Each 95 % "
        "interval (Student's t) holds for one comparison. Seconds per iteration include the data "
        "and were measured with one thread. The peak memory is that of the GPU if one is used, and "
        "else that of the process. Both are medians of runs that had the machine for themselves."
    )
    text += [searched] if searched else []
    text.append(report.origin([*rows, *solo]))
    (out / "table.md").write_text("\n\n".join(text) + "\n")
    last = rows[-1]["data"]
    report.plot([row for row in rows if row["data"] == last], out / "plot.png")
    return "\n\n".join(text)


def list_weights(scores: Dict[str, Dict[float, float]]) -> str:
    """The result of the search as a list in Markdown."""
    lines = ["These weights were tried. AP is on the held-out images, the chosen one is bold.", ""]
    for name, found in scores.items():
        cells = {w: f"{w:g}: {found[w]:.1f}".replace("-inf", "failed") for w in sorted(found)}
        cells[best(found)] = f"**{cells[best(found)]}**"
        lines.append(f"- {name}: {', '.join(cells.values())}")
    return "\n".join(lines) if scores else ""


def parse_args(words: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--on", choices=EXPERIMENTS, default="shapes", help="which configs and data")
    add(
        "--methods",
        nargs="+",
        default=[],
        help="vanilla[:*FACTOR] or [LOSS+]LOSS[:KEY=VALUE|:*FACTOR]...",
    )
    add("--ablation", nargs="+", default=[], choices=ABLATIONS, help="variants of ssim")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="seeds of every method")
    add("--budget", type=int, nargs="+", default=[500], help="iterations; each makes a table")
    add("--search-budget", type=int, help="iterations in the search; default: the shortest budget")
    add("--search-seeds", type=int, nargs="*", default=[101], help="none for the default weights")
    add("--jobs", type=int, default=os.cpu_count(), help="number of processes, a thread each")
    add("--out", help="folder of runs and report; default: output/compare_<on>")
    add("--records", type=Path, help="a records.json with runs that are not repeated")
    add("--timing-rounds", type=int, default=3, help="timed runs of each method, may be 0")
    add("--timing-iters", type=int, default=60, help="iterations of a timed run")
    add("opts", nargs="*", help="overrides for every run, after --")
    args = parser.parse_args(words)
    args.out = args.out or str(ROOT / f"output/compare_{args.on}")
    return args


def main() -> None:
    """Runs the script."""
    args = parse_args()
    with exit_in_one_line():
        load_config(str(ROOT / EXPERIMENTS[args.on].vanilla), args.opts)
        check_teacher(EXPERIMENTS[args.on].distilled, args.opts)
        methods = select(args)
        if args.on != "photos":  # draws the images before several processes do
            DatasetCatalog.get("ssimkd_shapes_val")
        comparison, out = Comparison(args), Path(args.out).resolve()
        if args.records:
            restore(args.records, out)
        names = dict.fromkeys(method.searched_as for method in methods if method.loss)
        searched = [parse_method(n) for n in names if args.search_seeds]
        scores = comparison.search_all(searched) if searched else {}
        weights = choose(methods, scores)
        rows = comparison.compare(weights)
        gather(out)
        if rows:
            solo = comparison.measure(weights)
            print(write_report(out, rows, solo, list_weights(scores)))
    comparison.runner.exit_if_failed()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
