"""Proposes a weight for the distillation losses of a config, from the start of its training.

    ssimkd weight --config-file ssimkd_R50.yaml --num-gpus 8
    ssimkd weight --config-file my_student.yaml --iters 200 MODEL.DISTILL.LOSSES "('pkd',)"

The command runs the first --iters iterations of the training in a temporary folder. It measures two
gradients at the maps that the backbone returns: that of the distillation losses, and that of the
detector's own losses. The ratio of their norms is proportional to the weight. The last line is the
override that gives the recommended ratio; docs/losses.md has the reason for it. Several losses keep
the proportions of their weights.
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
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from tqdm import tqdm

from ssimkd.engine.arguments import load_config
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.losses import KDLoss
from ssimkd.modeling.several_teachers import distillers_in
from ssimkd.teacher.heads import NAMES
from ssimkd.utils.config_keys import key_of
from ssimkd.utils.user_code import IMPORTED

from . import begin

PERIOD = 10  # iterations between two measurements of the gradients
# The ratio of the gradients that is recommended; see "Choosing a weight" in docs/losses.md.
RECOMMENDED = 25.0


def losses_in(cfg) -> Iterator[Tuple[KDLoss, str]]:
    """Each loss of a config and the node of its options."""
    for teacher, distiller in distillers_in(cfg):
        for number, loss in enumerate(distiller.losses.values()):
            if isinstance(cfg, CfgNode):
                yield loss, f"MODEL.DISTILL.{loss.name.upper()}"
            else:
                yield loss, f"model.distiller.{teacher}".rstrip(".") + f".losses.{number}"


def key_in(node: str, option: str) -> str:
    """The key of an option in a node of :func:`losses_in`."""
    return f"{node}.{option.upper() if node.isupper() else option}"


def weights_of(cfg) -> Dict[str, float]:
    """The key of each weight above 0 -> the weight, of the losses that are measured.

    Losses on predictions are left out beside losses on maps: their gradient reaches the maps
    through the heads, where it cannot be told from the detector's.

    Raises:
        ConfigError: nothing is distilled.
    """
    found = [(key_in(node, "weight"), loss) for loss, node in losses_in(cfg) if loss.weight]
    if not found:
        raise ConfigError(
            "MODEL.DISTILL.LOSSES (lazy: model.distiller.losses) names no loss of a weight above 0"
        )
    on_maps = {key: loss.weight for key, loss in found if loss.of_maps}
    return on_maps or {key: loss.weight for key, loss in found}


def delays_in(cfg) -> List[str]:
    """The keys of all first iterations, warm-ups, cool-downs and ends of a config's losses."""
    keys = [key_in(node, loss.starts_after) for loss, node in losses_in(cfg) if loss.starts_after]
    for teacher, _ in [("", None)] if isinstance(cfg, CfgNode) else distillers_in(cfg):
        node = "MODEL.DISTILL" if isinstance(cfg, CfgNode) else f"model.distiller.{teacher}"
        phases = ("warmup_iters", "cooldown_iters", "stop_iter")
        keys += [key_in(node.rstrip("."), phase) for phase in phases]
    return keys


def logging_gradients(cfg) -> List[str]:
    """Overrides that log the gradients of :func:`weights_of`.

    They leave out warm-ups and delays of the losses, evaluations and pictures.
    """
    measured = weights_of(cfg)
    weights = [key_in(node, "weight") for _, node in losses_in(cfg)]
    settings: Dict[str, Any] = dict.fromkeys((k for k in weights if k not in measured), 0.0)
    settings.update(dict.fromkeys(delays_in(cfg), 0))
    if isinstance(cfg, CfgNode):
        settings.update({"MODEL.DISTILL.LOG_GRADIENTS": PERIOD, "VIS_PERIOD": 0})
        settings.update({"DATASETS.TEST": (), "TEST.EXPECTED_RESULTS": []})
        words = [word for key, value in settings.items() for word in (key, str(value))]
        return [*words, "MODEL.DISTILL.WANDB_PROJECT", ""]
    settings.update({"model.log_gradients": PERIOD, "train.eval_period": 0})
    if "vis_period" in cfg.model:
        settings["model.vis_period"] = 0
    return [f"{key}={value}" for key, value in settings.items()] + ["+train.wandb_project="]


def probe(cfg, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Starts the training and returns the metrics that it logs in `args.iters` iterations.

    Raises:
        ConfigError: the training failed, or logged nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        key, iters = key_of(cfg, "output"), args.iters
        output_dir = [key, folder] if isinstance(cfg, CfgNode) else [f"{key}={folder}"]
        command = [sys.executable, "-m", "ssimkd", "train", "--config-file", args.config_file]
        command += [word for name in IMPORTED for word in ("--import", name)]
        command += ["--num-gpus", str(args.num_gpus), *args.opts]
        command += [*logging_gradients(cfg), *output_dir]
        output, metrics = Path(folder, "output.txt"), Path(folder, "metrics.json")
        rows: List[Dict[str, Any]] = []
        with open(output, "w") as stream, tqdm(total=iters, unit="iteration", disable=None) as bar:
            process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                done = 0
                while process.poll() is None and done < iters:
                    time.sleep(0.5)
                    rows = read_rows(metrics)
                    done = min(iters, rows[-1]["iteration"] + 1) if rows else 0
                    bar.update(done - bar.n)  # does nothing where the output is a file
                status = process.poll()  # None: it is still running, and is not needed any longer
            finally:
                with suppress(ProcessLookupError):  # the training may have ended by itself
                    os.killpg(process.pid, signal.SIGKILL)  # stops the processes of all GPUs
                process.wait()
        if status or not rows:
            last = output.read_text(errors="replace").strip().splitlines()[-1:]
            raise ConfigError(f"the training failed. Its last line is: {''.join(last)}")
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


def report(weights: Dict[str, float], logged: Dict[str, float]) -> str:
    """The text for the terminal.

    Raises:
        ConfigError: no gradient was logged.
    """
    ratio = logged.get("gradient_ratio", 0.0)
    if not ratio > 0:
        raise ConfigError("--iters: no gradient was logged; take more iterations")
    lines = ["| loss/level | value, weight 1 | gradient ratio |", "|---|---|---|"]
    for key, value in ((key, value) for key, value in logged.items() if "_kd/" in key):
        level = logged.get(f"gradient_ratio/{key.rsplit('/', 1)[1]}")
        lines.append(f"| {key} | {value:.3g} | {'-' if level is None else f'{level:.3g}'} |")
    at_heads = any(logged.get(f"gradient_ratio/{kind}", 0.0) > 0 for kind in NAMES)
    where = "predictions" if at_heads else "maps"
    lines += [
        "",
        f"At the student's {where} the gradient of the distillation is {ratio:.3g} times that of",
        f"the detector's losses. Recommended is {RECOMMENDED:g}:",
        "",
    ]
    numbers = {key: f"{weight * RECOMMENDED / ratio:.2g}" for key, weight in weights.items()}
    equals = {key: " " if key.isupper() else "=" for key in weights}
    return "\n".join(lines + [f"    {key}{equals[key]}{x}" for key, x in numbers.items()])


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    args = begin("weight", words)
    cfg = load_config(args.config_file, args.opts)
    weights = weights_of(cfg)
    keys = dict.fromkeys(key_in(node, "weight") for loss, node in losses_in(cfg) if loss.weight)
    others = [key for key in keys if key not in weights]
    if others:
        print(
            f"Neither measured nor changed, because it acts on predictions: {', '.join(others)}\n"
        )
    print(report(weights, medians(probe(cfg, args))))
