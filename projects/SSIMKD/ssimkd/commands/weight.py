#!/usr/bin/env python
r"""Proposes the weight of the distillation losses of a config, from the start of its training.

    python tools/suggest_weight.py --config-file configs/ssimkd_R50.yaml --num-gpus 8
    python tools/suggest_weight.py --config-file configs/shapes/ssimkd.yaml --iters 200 \
        MODEL.DISTILL.LOSSES "('pkd',)"

Runs the config's training for some iterations, writes nothing beside it, and measures how long the
gradient of the distillation losses is against that of the detector's own, at the maps that the
backbone returns. On the embedded data seven of eleven losses did best at 5 to 120 times and the
others, SSIM among them, higher (docs/comparison.md); there every parameter's gradient was clipped
to length 1, without which (SOLVER.CLIP_GRADIENTS) a long one may do harm. --ratio (8) is a place
to start a search from.
Several losses keep their weights' proportions.

The iterations watched are the training's first, within the learning rate's warm-up: take --iters
beyond it (SOLVER.WARMUP_ITERS) where the ratio of a student that has settled is wanted.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Sequence

from detectron2.config import CfgNode, instantiate
from tqdm import tqdm

import ssimkd  # noqa: F401 (first: it silences warnings of other packages)
from ssimkd import ConfigError
from ssimkd.engine.arguments import add_flags, load_config
from ssimkd.errors import exit_in_one_line
from ssimkd.modeling.several_teachers import Distillers, build_distiller

ROOT = Path(__file__).resolve().parents[1]
PERIOD = 10  # iterations between two looks at the gradients
LEAST = 2 * PERIOD  # iterations until there is a line of the log with a gradient
GOOD = (5.0, 120.0)  # ratios of the best weights, docs/comparison.md


def weights_of(cfg) -> Dict[str, float]:
    """Loss, "<teacher>/<loss>" with several teachers -> the weight that a config gives it.

    Raises:
        ConfigError: nothing is distilled.
    """
    lazy = not isinstance(cfg, CfgNode)
    distiller: Any = instantiate(cfg.model.get("distiller")) if lazy else build_distiller(cfg)
    pairs: Any = distiller.named() if isinstance(distiller, Distillers) else [("", distiller)]
    weights = {
        f"{teacher}/{loss.name}".lstrip("/"): loss.weight
        for teacher, one in pairs
        for loss in (one.losses.values() if one is not None else ())
    }
    if not any(weights.values()):
        raise ConfigError(
            "MODEL.DISTILL.LOSSES (lazy: model.distiller.losses) names no loss of a weight above 0"
        )
    return weights


def watching(cfg) -> List[str]:
    """Overrides of a config that log the gradients."""
    if isinstance(cfg, CfgNode):
        return ["MODEL.DISTILL.LOG_GRADIENTS", str(PERIOD)]
    return [f"model.log_gradients={PERIOD}"]


def probe(
    config: str, iters: int, num_gpus: int, opts: List[str], flags: Sequence[str] = ()
) -> List[Dict[str, Any]]:
    """The metrics that the first `iters` iterations of a training log.

    Raises:
        ConfigError: the training ends before.
    """
    with tempfile.TemporaryDirectory() as folder:
        lazy = config.endswith(".py")
        own = [f"train.output_dir={folder}"] if lazy else ["OUTPUT_DIR", folder]
        command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", config]
        command += ["--num-gpus", str(num_gpus), *flags, *opts, *own]
        output, metrics = Path(folder, "output.txt"), Path(folder, "metrics.json")
        rows: List[Dict[str, Any]] = []
        with open(output, "w") as stream, tqdm(total=iters, unit="iteration") as bar:
            process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while process.poll() is None and bar.n < iters:
                    time.sleep(0.5)
                    rows = read_rows(metrics)
                    bar.update(min(iters, rows[-1]["iteration"] + 1) - bar.n if rows else 0)
            finally:
                with suppress(ProcessLookupError):  # it has ended by itself
                    os.killpg(process.pid, signal.SIGKILL)  # the processes of all GPUs
                process.wait()
        if not rows:
            last = output.read_text(errors="replace").strip().splitlines()[-1:]
            raise ConfigError(f"the training logged nothing; its last line: {''.join(last)}")
    return rows


def read_rows(path: Path) -> List[Dict[str, Any]]:
    """The whole lines of a metrics.json that is being written; none where there is no file yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def medians(rows: List[Dict[str, Any]]) -> Dict[str, float]:
    """Metric -> its median over the later half of the log, where the start has settled."""
    late = rows[len(rows) // 2 :]
    keys = dict.fromkeys(key for row in late for key in row)
    return {key: statistics.median(row[key] for row in late if key in row) for key in keys}


def report(weights: Dict[str, float], logged: Dict[str, float], wanted: float) -> str:
    """The text for a terminal.

    Raises:
        ConfigError: no gradient was logged.
    """
    ratio = logged.get("gradient_ratio", 0.0)
    if not ratio > 0:
        raise ConfigError(f"--iters: no gradient was logged; take at least {LEAST}")
    values = {key: value for key, value in logged.items() if "_kd/" in key}
    lines = ["| loss/level | value, weight 1 | gradient over the detector's |", "|---|---|---|"]
    for key, value in values.items():
        level = logged.get(f"gradient_ratio/{key.rsplit('/', 1)[1]}")
        lines.append(f"| {key} | {value:.3g} | {'-' if level is None else f'{level:.3g}'} |")
    low, high = GOOD
    inside = "within" if low <= ratio <= high else "outside of"
    lines += ["", f"At all levels together the ratio is {ratio:.3g}; that is {inside} {low:g} to"]
    lines.append(f"{high:g}, where most losses did best on the embedded data (clipped gradients).")
    for name, weight in weights.items():
        least, start, most = (weight * r / ratio for r in (low, wanted, high))
        lines.append(
            f"  weight of {name}, now {weight:g}: {least:.2g} to {most:.2g}; "
            f"ratio {wanted:g} is {start:.2g}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", "--config", required=True, help="of the run to come, .yaml or .py"
    )
    parser.add_argument(
        "--iters", type=int, default=300, help=f"iterations to watch, at least {LEAST}"
    )
    parser.add_argument("--ratio", type=float, default=8.0, help="to give the weight of (8)")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the config, last")
    add_flags(parser)
    args = parser.parse_args()
    if args.iters < LEAST:
        parser.error(f"--iters must be at least {LEAST}")
    if args.num_gpus < 1:
        parser.error("--num-gpus must be at least 1")
    if not args.ratio > 0:
        parser.error("--ratio must be above 0")
    flags: List[str] = []
    with exit_in_one_line(args.debug):
        cfg = load_config(args.config_file, args.opts)
        weights, opts = weights_of(cfg), [*args.opts, *watching(cfg)]
        rows = probe(args.config_file, args.iters, args.num_gpus, opts, flags)
        print(report(weights, medians(rows), args.ratio))


if __name__ == "__main__":
    main()
