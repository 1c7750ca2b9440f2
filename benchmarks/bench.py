#!/usr/bin/env python
"""Times what distillation costs, and compares it with other implementations.

    python benchmarks/bench.py --loss --step --growth        # all parts
    python benchmarks/bench.py --loss --cpu-time             # on a machine that others use as well
    python benchmarks/bench.py --step --losses ssim l1       # a step of configs/ssimkd_R50.yaml
    python benchmarks/bench.py --growth --processes 4        # with more images, pixels, processes

Each part writes a table to <out>/<part>.md and its numbers to <out>/<part>.json. Times are medians
over repeats in which the compared calls take turns. Something that slows the machine then slows all
of them, so ratios of times are more reliable than times. Detectors have random weights.
"""

import argparse
import importlib.util
import json
from importlib import metadata
from pathlib import Path
from typing import Dict

import torch
from bench_growth import bench_growth, growth_table
from bench_loss import LOSSES, OWN, STRIDES, bench_loss, loss_table
from bench_step import OF_MAPS, bench_step, step_table
from ssimkd.engine.run_record import commit, machine
from ssimkd.errors import exit_in_one_line
from ssimkd_cli import at_least


def conditions(threads: int) -> Dict[str, str]:
    """The machine and the versions with which a figure has to be quoted."""
    peers = [name for name in LOSSES if importlib.util.find_spec(name.replace("-", "_"))]
    versions = [f"{name} {metadata.version(name)}" for name in peers if name != OWN]
    return {
        "machine": f"{machine()}, {threads} threads used",
        "versions": ", ".join([f"torch {torch.__version__}", *versions]),
    }


# part -> its measurement and its table
PARTS = {
    "loss": (bench_loss, loss_table),
    "step": (bench_step, step_table),
    "growth": (bench_growth, growth_table),
}


def parse(argv=None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=at_least(1), default=1, help="CPU threads of torch")
    add("--size", type=at_least(1), nargs=2, default=(800, 1333), help="height and width in pixels")
    add("--cpu-time", action="store_true", help="measure CPU time instead of the time that passes")
    add("--out", type=Path, default=Path("output/benchmark"), help="folder of the tables")
    add("--loss", action="store_true", help="measure SSIM, forward and backward")
    add("--images", type=at_least(1), default=2, help="images of a batch of --loss")
    add("--channels", type=at_least(1), default=256, help="channels of each map of --loss")
    add("--levels", nargs="+", choices=STRIDES, default=list(STRIDES), help="levels of --loss")
    add("--implementations", nargs="+", choices=LOSSES, help="implementations of --loss (all)")
    add("--repeats", type=at_least(1), default=5, help="repeats of --loss (5)")
    add("--step", action="store_true", help="measure a training step with each loss and without")
    add("--config", default="configs/ssimkd_R50.yaml", help="config of --step and --growth")
    add("--losses", nargs="+", choices=OF_MAPS, help="losses of --step (all of maps)")
    add("--step-images", type=at_least(1), default=1, help="images of a batch of --step")
    add("--step-repeats", type=at_least(1), default=3, help="repeats of --step and --growth (3)")
    add("--growth", action="store_true", help="measure how loss and step grow")
    add(
        "--growth-size", type=at_least(1), nargs=2, default=(192, 256), help="of the smallest image"
    )
    add("--processes", type=at_least(1), default=2, help="largest number of processes of --growth")
    add("opts", nargs="*", help="overrides of --config, KEY VALUE, after --")
    args = parser.parse_args(argv)
    if not any(getattr(args, part) for part in PARTS):
        parser.error(f"choose a part: {', '.join('--' + part for part in PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if not args.config.endswith((".yaml", ".yml")):
        parser.error(f"--config: {args.config} is not a .yaml file")
    return args


def bench(args: argparse.Namespace) -> None:
    """Runs the chosen parts."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for part in (part for part in PARTS if getattr(args, part)):
        measure, table = PARTS[part]
        results = measure(args)
        about = conditions(args.threads)
        settings = {k: v for k, v in vars(args).items() if k not in (*PARTS, "out")}
        record = {"commit": commit(), "machine": about, "settings": settings, "results": results}
        (args.out / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n")
        text = f"{table(results)}\n\n{'; '.join(about.values())}\n"
        (args.out / f"{part}.md").write_text(text)
        print(f"\n{text}\n{args.out / part}.json, .md")


@exit_in_one_line()
def main(argv=None) -> None:
    """Runs the script."""
    bench(parse(argv))


if __name__ == "__main__":
    main()
