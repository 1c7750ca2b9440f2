#!/usr/bin/env python
"""Trains a small student on the Shapes data with and without its teacher, and prints a table.

    python tools/train_shapes.py                     # one seed, as `make train` does
    python tools/train_shapes.py --seeds 1 2 3

Each row of the table comes from runs of train_net.py, whose commands are printed. The table is also
written to output/shapes/table.md. `ssimkd report` makes a page about all runs.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List

import ssimkd  # noqa: F401 (before Detectron2, whose import makes torch warn)
from detectron2.modeling import build_model
from ssimkd.engine.arguments import load_config
from ssimkd.utils.measure import markdown, mean_and_deviation

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "vanilla student": "configs/shapes/vanilla.yaml",
    "SSIM student": "configs/shapes/ssimkd.yaml",
    "teacher": "configs/shapes/teacher.yaml",
}
METRICS = ("AP", "AP50", "AP75")


def folder(name: str, seed: int) -> Path:
    """The folder of a run, from the root of the repository."""
    return Path("output/shapes") / f"{name.replace(' ', '_')}_seed{seed}"


def run(name: str, seed: int, opts: List[str]) -> Dict[str, float]:
    """Trains a student, or evaluates the teacher that the repository keeps; returns its metrics."""
    out = folder(name, seed)
    command = [sys.executable, "train_net.py", "--quiet", "--config-file", CONFIGS[name]]
    if name == "teacher":
        command += ["--eval-only", "MODEL.WEIGHTS", "configs/shapes/teacher.pth"]
    command += ["OUTPUT_DIR", str(out), "SEED", str(seed), *opts]
    print(f"\n== {name}: {shlex.join(['python', *command[1:]])}", flush=True)
    status = subprocess.run(command, cwd=ROOT).returncode
    if status:
        sys.exit(status)
    return json.loads((ROOT / out / "results.json").read_text())["bbox"]


def parameters(name: str) -> int:
    """Number of parameters of a detector, without those that only the distillation needs."""
    cfg = load_config(str(ROOT / CONFIGS[name]), ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])
    return sum(p.numel() for p in build_model(cfg).parameters())


def table(results: Dict[str, List[Dict[str, float]]]) -> str:
    """A table in Markdown. Several runs are shown by mean and standard deviation."""
    rows = []
    for name, runs in results.items():
        cells = [mean_and_deviation([r[metric] or 0.0 for r in runs]) for metric in METRICS]
        rows.append([name, *cells, f"{parameters(name) / 1e6:.2f} M"])
    return markdown(["", *METRICS, "parameters"], rows)


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds of the students")
    parser.add_argument("opts", nargs="*", help="overrides for every run, after --")
    args = parser.parse_args()
    start = time.perf_counter()
    results: Dict[str, List[Dict[str, float]]] = {}
    for name in CONFIGS:
        seeds = args.seeds[:1] if name == "teacher" else args.seeds
        results[name] = [run(name, seed, args.opts) for seed in seeds]
    text = table(results)
    (ROOT / "output/shapes/table.md").write_text(text + "\n")
    print(f"\nBox AP on ssimkd_shapes_val, {time.perf_counter() - start:.0f} s:\n\n{text}\n")
    students = [str(folder(n, s)) for n in ("SSIM student", "vanilla student") for s in args.seeds]
    command = [sys.executable, "-m", "ssimkd", "report", *students]
    teacher = str(folder("teacher", args.seeds[0]))
    sys.exit(subprocess.run([*command, teacher], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
