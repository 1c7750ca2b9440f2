#!/usr/bin/env python
r"""AP against the share of the training images that have labels.

    python benchmarks/labels.py                          # Shapes, 1000 iterations
    python benchmarks/labels.py --on photos --budget 400

For each share and seed it trains three students for the same number of iterations: without a
teacher, with ssim on the labelled images, and with ssim on all images. A step of the third student
has as many images without labels as with them. Where all images have labels, there is no third
student.

The labelled images are the first of the data set, for every seed. The weight of ssim is that of
the config; it is not searched.

Finished runs are not repeated when the command is started again. With --records FILE, the runs in
this file are not repeated either. The folder --out then holds table.md, plot.png and records.json
(every finished run, for --records).
"""

import argparse
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import compare_report as report
from compare import metrics_of, origin_of
from compare_methods import ROOT
from compare_runs import Run, Runner, gather, restore, schedule
from detectron2.data import DatasetCatalog
from matplotlib.figure import Figure
from ssimkd.engine.arguments import load_config
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.utils.measure import markdown, mean_and_deviation

METHODS = VANILLA, SSIM, SSIM_ON_ALL = ("vanilla", "ssim", "ssim on all images")
# folder of the two configs, name of the training images, the dataset of the results
DATA = {
    "shapes": ("configs/shapes", "ssimkd_shapes_train", "ssimkd_shapes_val"),
    "photos": ("configs/photos", "bccd_train", "bccd_test"),
}
Samples = Dict[Tuple[int, str], Dict[int, float]]  # (percent, method) -> seed -> AP


def plan(args: argparse.Namespace) -> Dict[Tuple[int, str, int], Run]:
    """(percent of labelled images, method, seed) -> the run.

    Raises:
        ConfigError: an override sets what the script sets.
    """
    folder, train, test = DATA[args.on]
    cfg = load_config(str(ROOT / folder / "ssimkd.yaml"), args.opts, splits=())
    runs = {}
    for seed in args.seeds:
        for percent in args.shares:
            for method in METHODS if percent < 100 else (VANILLA, SSIM):
                settings = ["SEED", seed, *schedule(args.budget), "DATASETS.TEST", (test,)]
                settings += ["DATASETS.TRAIN", (f"{train}[:{percent}%]",)]
                if method == SSIM_ON_ALL:
                    settings += ["DATASETS.UNLABELED", (f"{train}[{percent}%:]",)]
                    batch = cfg.SOLVER.IMS_PER_BATCH
                    settings += ["SOLVER.IMS_PER_BATCH_UNLABELED", batch]
                taken = {*settings[::2], "DATASETS.UNLABELED", "MODEL.DISTILL.LOSSES"}
                for key in taken & {*args.opts[::2]}:
                    raise ConfigError(f"{key} cannot be overridden, because this script sets it")
                name = "vanilla" if method == VANILLA else "ssimkd"
                where = Path(args.out).resolve() / f"{percent}" / method.replace(" ", "_")
                opts = (*map(str, settings), *args.opts)
                runs[percent, method, seed] = Run(
                    where / f"seed{seed}", f"{folder}/{name}.yaml", opts
                )
    return runs


def table(samples: Samples) -> str:
    """Mean and standard deviation of AP as a table in Markdown: a row per method.

    A cell says the number of its seeds if another cell has more.
    """
    most = max(map(len, samples.values()))
    shares = sorted({percent for percent, _ in samples})
    rows = []
    for method in METHODS:
        cells = [method]
        for percent in shares:
            values = [*samples.get((percent, method), {}).values()]
            seeds = f" ({len(values)} of {most} seeds)" if len(values) < most else ""
            cells.append(f"{mean_and_deviation(values)}{seeds}" if values else "-")
        rows.append(cells)
    head = ["box AP", *(f"{percent} % of the labels" for percent in shares)]
    gains = [gain(samples, percent) for percent in shares]
    return markdown(head, [*rows, [f"{SSIM_ON_ALL} minus {SSIM}", *gains]])


def gain(samples: Samples, percent: int) -> str:
    """What the images without labels add: the mean and its 95 % interval, paired by seed."""
    found = report.paired(samples.get((percent, SSIM_ON_ALL), {}), samples.get((percent, SSIM), {}))
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]" if found else "-"


def plot(samples: Samples, path: Path) -> None:
    """Draws a dot for each seed and a line through the means."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, method in enumerate(METHODS):
        found = {p: [*samples[p, m].values()] for p, m in sorted(samples) if m == method}
        for percent, values in found.items():
            axes.plot([percent] * len(values), values, "o", color=f"C{index}", alpha=0.5, ms=4)
        means = [statistics.mean(values) for values in found.values()]
        axes.plot([*found], means, color=f"C{index}", label=method)
    axes.set_xlabel("training images with labels (%)")
    axes.set_ylabel("box AP (dot: seed, line: mean)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def parse_args(words: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--on", choices=DATA, default="shapes", help="which configs and data")
    percents = range(1, 101)
    add("--shares", type=int, nargs="+", default=[10, 25, 100], choices=percents, metavar="PERCENT")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--budget", type=int, default=1000, help="iterations of every run")
    add("--jobs", type=int, default=os.cpu_count(), help="number of processes, a thread each")
    add("--out", help="folder of runs and report; default: output/labels_<on>")
    add("--records", type=Path, help="a records.json with runs that are not repeated")
    add("opts", nargs="*", help="overrides for every run, after --")
    args = parser.parse_args(words)
    args.out = args.out or str(ROOT / f"output/labels_{args.on}")
    return args


def main() -> None:
    """Runs the script."""
    args, runner = parse_args(), Runner()
    with exit_in_one_line():
        runs, out = plan(args), Path(args.out).resolve()
        if args.records:
            restore(args.records, out)
        if args.on == "shapes":  # draws the images before several processes do
            DatasetCatalog.get("ssimkd_shapes_val")
        runner.finish(runs.values(), "labels", args.jobs)
        gather(out)
    samples: Samples = defaultdict(dict)
    origins: List[Dict[str, str]] = []
    for (percent, method, seed), run in runs.items():
        record = run.record()
        if record:
            samples[percent, method][seed] = metrics_of(record["bbox"])["AP"]
            origins.append(origin_of(record))
    if samples:
        text = f"{table(samples)}\n\n{report.origin(origins)}\n"
        (out / "table.md").write_text(text)
        plot(samples, out / "plot.png")
        print(text)
    runner.exit_if_failed()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
