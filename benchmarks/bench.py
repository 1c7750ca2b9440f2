#!/usr/bin/env python
"""Times what distillation costs, and compares it with other implementations.

    python benchmarks/bench.py --loss --step --growth           # all parts
    python benchmarks/bench.py --loss --cpu-time                # on a machine that others use, too
    python benchmarks/bench.py --loss --size 480 640 --levels p3 p4 p5 --repeats 9
    python benchmarks/bench.py --step --losses ssim l1          # a step of configs/ssimkd_R50.yaml
    python benchmarks/bench.py --growth --processes 4           # and of more images, pixels, ...

Each part writes <out>/<part>.json and <out>/<part>.md, a table. Times are medians over repeats that
take what is compared in turn, so that what slows the machine slows all of it. Quote their ratios,
with the machine. Implementations that are not installed are named. Detectors have random weights.
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
from bench_step import bench_step, step_table
from ssimkd.engine.run_record import machine
from ssimkd.errors import exit_in_one_line
from ssimkd.losses import KD_LOSS_REGISTRY
from ssimkd.utils.measure import positive


def quoted_with(threads: int) -> Dict[str, str]:
    """What a figure has to be quoted with."""
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
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    known = sorted(name for name, _ in KD_LOSS_REGISTRY)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=positive, default=1, help="CPU threads of torch")
    add("--size", type=positive, nargs=2, default=(800, 1333), help="height and width in pixels")
    add("--cpu-time", action="store_true", help="count CPU time, not the clock's")
    add("--out", type=Path, default=Path("output/benchmark"))
    add("--loss", action="store_true", help="SSIM, forward and backward")
    add("--images", type=positive, default=2, help="images of a batch of --loss")
    add("--channels", type=positive, default=256, help="channels of each map of --loss")
    add("--levels", nargs="+", choices=STRIDES, default=list(STRIDES), help="of --loss")
    add("--implementations", nargs="+", choices=LOSSES, help="of --loss; all unless given")
    add("--repeats", type=positive, default=5, help="of --loss on a large level, at least 3")
    add("--step", action="store_true", help="a training step, distilled and not")
    add("--config", default="configs/ssimkd_R50.yaml", help="of --step and --growth")
    add("--losses", nargs="+", choices=known, help="of --step; all unless given")
    add("--step-images", type=positive, default=1, help="images of a batch of --step")
    add("--step-repeats", type=positive, default=3)
    add("--growth", action="store_true", help="how loss and step grow, from one small image")
    add("--growth-size", type=positive, nargs=2, default=(192, 256), help="of the smallest image")
    add("--growth-repeats", type=positive, default=3)
    add("--processes", type=positive, default=2, help="largest number of processes of --growth")
    add("opts", nargs="*", help="overrides of --config, KEY VALUE; after -- or before options")
    args = parser.parse_args(argv)
    if not any(getattr(args, part) for part in PARTS):
        parser.error(f"choose a part: {', '.join('--' + part for part in PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if not args.config.endswith((".yaml", ".yml")):
        parser.error(f"--config: {args.config} is no .yaml")
    return args


def bench(args: argparse.Namespace) -> None:
    """Runs the parts that were chosen.

    Raises:
        ConfigError: --config, --out or what is compared cannot be used.
    """
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for part in (part for part in PARTS if getattr(args, part)):
        measure, table = PARTS[part]
        results = measure(args)
        about = quoted_with(args.threads)
        settings = {k: v for k, v in vars(args).items() if k not in (*PARTS, "out")}
        record = {"machine": about, "settings": settings, "results": results}
        (args.out / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n")
        text = f"{table(results)}\n\n{'; '.join(about.values())}\n"
        (args.out / f"{part}.md").write_text(text)
        print(f"\n{text}\n{args.out / part}.json, .md")


def main(argv=None) -> None:
    """Command line of this script."""
    args = parse(argv)
    with exit_in_one_line():
        bench(args)


if __name__ == "__main__":
    main()
