"""Proposes a weight for the distillation losses of a config, from the start of its training.

    ssimkd weight --config-file ssimkd_R50.yaml --num-gpus 8
    ssimkd weight --config-file my_student.yaml --iters 200 MODEL.DISTILL.LOSSES "('pkd',)"

The command runs the first --iters iterations of the training in a temporary folder. It measures two
gradients at the maps that the backbone returns: that of the distillation losses, and that of the
detector's own losses. The ratio of their lengths is proportional to the weight. On the Shapes data
most losses did best at ratios of 5 to 120, and SSIM did best at a higher one (docs/comparison.md).
The gradients were clipped there (SOLVER.CLIP_GRADIENTS). Without clipping a large ratio may do
harm. The weight for --ratio 8 is a place to start a search from. Several losses keep the
proportions of their weights.
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
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode, instantiate
from tqdm import tqdm

from ssimkd.engine.arguments import load_config
from ssimkd.errors import ConfigError, exit_in_one_line, naming_lazy_fields
from ssimkd.modeling.distiller import Distiller
from ssimkd.modeling.several_teachers import build_distiller, distillers_of
from ssimkd.utils.config_keys import key_of

from . import add_overrides, at_least, command_parser

PERIOD = 10  # iterations between two measurements of the gradients
LEAST = 2 * PERIOD  # iterations until the log holds a gradient
GOOD = (5.0, 120.0)  # range of the ratios of the best weights, docs/comparison.md


def distillers_in(cfg) -> Iterator[Tuple[str, Distiller]]:
    """The name of each teacher of a config, and its Distiller; the name of a single one is ""."""
    lazy = not isinstance(cfg, CfgNode)
    with naming_lazy_fields(lazy):
        distiller: Any = instantiate(cfg.model.get("distiller")) if lazy else build_distiller(cfg)
    return distillers_of(SimpleNamespace(distiller=distiller))


def weights_of(cfg) -> Dict[str, float]:
    """Loss, or "<teacher>/<loss>" with several teachers -> the weight that a config gives it.

    Raises:
        ConfigError: nothing is distilled.
    """
    weights = {
        f"{teacher}/{loss.name}".lstrip("/"): loss.weight
        for teacher, distiller in distillers_in(cfg)
        for loss in distiller.losses.values()
    }
    if not any(weights.values()):
        raise ConfigError(
            "MODEL.DISTILL.LOSSES (lazy: model.distiller.losses) names no loss of a weight above 0"
        )
    return weights


def logging_gradients(cfg) -> List[str]:
    """Overrides that log the gradients."""
    if isinstance(cfg, CfgNode):
        return ["MODEL.DISTILL.LOG_GRADIENTS", str(PERIOD)]
    return [f"model.log_gradients={PERIOD}"]


def probe(cfg, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Starts the training and returns the metrics that it logs in `args.iters` iterations.

    Raises:
        ConfigError: the training ended before it logged anything.
    """
    with tempfile.TemporaryDirectory() as folder:
        key, iters = key_of(cfg, "output"), args.iters
        output_dir = [key, folder] if isinstance(cfg, CfgNode) else [f"{key}={folder}"]
        command = [sys.executable, "-m", "ssimkd", "train", "--config-file", args.config_file]
        command += ["--num-gpus", str(args.num_gpus), *args.opts]
        command += [*logging_gradients(cfg), *output_dir]
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
                with suppress(ProcessLookupError):  # the training may have ended by itself
                    os.killpg(process.pid, signal.SIGKILL)  # stops the processes of all GPUs
                process.wait()
        if not rows:
            last = output.read_text(errors="replace").strip().splitlines()[-1:]
            raise ConfigError(f"the training logged nothing. Its last line is: {''.join(last)}")
    return rows


def read_rows(path: Path) -> List[Dict[str, Any]]:
    """The complete lines of a metrics.json that is still written; none if there is no file yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def medians(rows: List[Dict[str, Any]]) -> Dict[str, float]:
    """Metric -> its median over the second half of the log."""
    late = rows[len(rows) // 2 :]
    keys = dict.fromkeys(key for row in late for key in row)
    return {key: statistics.median(row[key] for row in late if key in row) for key in keys}


def report(weights: Dict[str, float], logged: Dict[str, float], wanted: float) -> str:
    """The text for the terminal.

    Raises:
        ConfigError: no gradient was logged.
    """
    ratio = logged.get("gradient_ratio", 0.0)
    if not ratio > 0:
        raise ConfigError(f"--iters: no gradient was logged; take at least {LEAST}")
    lines = ["| loss/level | value, weight 1 | gradient over the detector's |", "|---|---|---|"]
    for key, value in ((key, value) for key, value in logged.items() if "_kd/" in key):
        level = logged.get(f"gradient_ratio/{key.rsplit('/', 1)[1]}")
        lines.append(f"| {key} | {value:.3g} | {'-' if level is None else f'{level:.3g}'} |")
    low, high = GOOD
    inside = "inside" if low <= ratio <= high else "outside"
    lines += ["", f"The ratio over all levels is {ratio:.3g}, {inside} the range of {low:g} to"]
    lines.append(f"{high:g} where most losses did best on the Shapes data (clipped gradients).")
    for name, weight in weights.items():
        least, start, most = (weight * r / ratio for r in (low, wanted, high))
        lines.append(
            f"  {name} has the weight {weight:g}; the range is {least:.2g} to {most:.2g}, "
            f"and {start:.2g} gives the ratio {wanted:g}"
        )
    return "\n".join(lines)


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    parser = command_parser("weight", __doc__)
    add = parser.add_argument
    add("--iters", type=at_least(LEAST), default=300, help="number of iterations (300)")
    add("--ratio", type=float, default=8.0, help="propose the weight that gives this ratio (8)")
    add("--num-gpus", type=at_least(1), default=1, help="number of GPUs (1)")
    add_overrides(parser)
    args = parser.parse_args(words)
    if not args.ratio > 0:
        parser.error("--ratio must be above 0")
    cfg = load_config(args.config_file, args.opts)
    weights = weights_of(cfg)
    print(report(weights, medians(probe(cfg, args)), args.ratio))
