"""Checks a student and its teachers before a long run.

    ssimkd check --config-file ssimkd_R50.yaml --num-gpus 8

The command builds student and teachers and makes every check that a run makes before its first
iteration. Then it runs --iterations iterations in a temporary folder. The learning rate is 0, so
the losses are those at the start of the training. --num-gpus is the number of GPUs of the long run.
This command gets the batch of one of them. The time does not include evaluations and the exchange
between GPUs.

The command prints a table with its findings and warnings. The exit status is 1 if there is an error
or a warning, and 0 otherwise. A note, such as one on a few boxes without area, is not a warning.
"""

import copy
import datetime
import json
import logging
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from omegaconf import OmegaConf
from ssimkd_cli import parse

from ssimkd.data.datasets import check_classes
from ssimkd.engine.arguments import check_config, load_config
from ssimkd.engine.driver import driver_of
from ssimkd.engine.preflight import warn_of_settings
from ssimkd.engine.writers import LOGGERS
from ssimkd.engine.yaml_driver import DistillTrainer
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.evaluation.predictor import device_of
from ssimkd.modeling.several_teachers import distillers_of
from ssimkd.teacher.preprocessing import Preprocessing
from ssimkd.utils.config_keys import datasets_of, names_of, setting, unlabeled_batch
from ssimkd.utils.lazy_fields import naming_lazy_fields

from . import begin
from .weight import delays_in

Row = Tuple[str, str]


class LogCollector(logging.Handler):
    """Collects the log records of the checks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: List[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the logger."""
        self.found.append(record)

    def rows(self) -> Iterator[Row]:
        """The results of the teachers' checks, and every warning."""
        for record in self.found:
            if record.levelno >= logging.WARNING:
                harmless = getattr(record, "harmless", False)
                yield "note" if harmless else "WARNING", record.getMessage()
            elif record.name == "ssimkd.engine.preflight":
                yield "check", record.getMessage()


def collect_logs() -> LogCollector:
    """Starts to collect the log records. The terminal shows other packages' warnings only."""
    remarks = LogCollector()
    for name in LOGGERS:
        logger = setup_logger(name=name)
        for handler in logger.handlers:
            handler.setLevel(logging.ERROR if name == "ssimkd" else logging.WARNING)
    logging.getLogger("ssimkd").addHandler(remarks)
    return remarks


def build(cfg) -> Any:
    """The student of a config with its teachers."""
    with naming_lazy_fields(not isinstance(cfg, CfgNode)):
        model = driver_of(cfg).build_with_teachers(cfg)
        enabled = [(name, one) for name, one in distillers_of(model) if one.enabled]
        if not enabled:
            raise ConfigError("MODEL.DISTILL: nothing is distilled by this config")
        for name, distiller in enabled:
            warn_of_settings(name, distiller, setting(cfg, "iterations"))
        check_classes(model, datasets_of(cfg, "TRAIN", "TEST"))
    return model


def pair_rows(model: Any) -> Iterator[Row]:
    """Rows on how images are prepared for each detector, and on which levels are compared."""
    yield "student sees", prepared(model.preprocessing)
    for name, distiller in distillers_of(model):
        teacher = distiller.teacher
        if teacher is None:  # one of several teachers may have no losses
            continue
        yield f"teacher {name}".rstrip() + " sees", prepared(teacher.preprocessing)
        for level, other in distiller.teacher_levels.items():
            shape, channels = distiller.student_shapes[level], teacher.shapes[other].channels
            way = " by conv1x1" if level in distiller.adapters else ""
            text = f"{shape.channels} channels -> {other}, {channels}{way}; stride {shape.stride}"
            yield f"{name} level {level}".lstrip(), text


def prepared(how: Preprocessing) -> str:
    """Describes how a detector's images are prepared."""
    if not how.mean:
        return f"{how.input_format}, prepared by code of its own"
    mean, std = (", ".join(f"{value:.4g}" for value in x) for x in (how.mean, how.std))
    divisor = how.padding[0] or 1
    return f"{how.input_format}, mean {mean}, std {std}, sides padded to multiples of {divisor}"


def short_run_config(cfg, folder: str, iterations: int, num_gpus: int):
    """The config of a short run that learns nothing: no warm-up, evaluation or picture is left."""
    batches = []
    for total in (setting(cfg, "batch") or 0, unlabeled_batch(cfg)):
        if total % num_gpus:
            raise ConfigError(f"--num-gpus: {total} images cannot be shared by {num_gpus} GPUs")
        batches.append(total // num_gpus)
    batch, unlabeled = batches
    if isinstance(cfg, CfgNode):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.merge_from_list([
            "OUTPUT_DIR", folder, "SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", (),
            "SOLVER.BASE_LR", 0.0, "SOLVER.IMS_PER_BATCH", batch, "DATASETS.TEST", (),
            "SOLVER.REFERENCE_WORLD_SIZE", 0, "TEST.PRECISE_BN.ENABLED", False,
            "TEST.EXPECTED_RESULTS", [],
            "SOLVER.IMS_PER_BATCH_UNLABELED", unlabeled,
            "VIS_PERIOD", 0, "MODEL.DISTILL.WANDB_PROJECT", "",
            *(word for key in delays_in(cfg) for word in (key, 0)),
        ])  # fmt: skip
        return cfg
    if batch:  # a loader of the user's own may not have it
        cfg.dataloader.train.total_batch_size = batch
    if cfg.dataloader.get("unlabeled"):
        cfg.dataloader.unlabeled.total_batch_size = unlabeled
    cfg.dataloader.pop("evaluator", None)
    cfg.optimizer.lr = 0.0
    cfg.train.output_dir, cfg.train.max_iter = folder, iterations
    cfg.train.wandb_project = ""
    if "vis_period" in cfg.model:
        cfg.model.vis_period = 0
    for key in delays_in(cfg):
        OmegaConf.update(cfg, key, 0, force_add=True)
    return cfg


def measure(cfg, folder: str, iterations: int, num_gpus: int) -> Dict[str, float]:
    """Runs the short training and returns the last metrics that Detectron2 logged.

    A metric that was put into the event storage in an earlier iteration has a line of its own.
    """
    short = short_run_config(cfg, folder, iterations, num_gpus)
    driver_of(cfg).train(short, resume=False)
    lines = (Path(folder) / "metrics.json").read_text().splitlines()
    return next(row for row in map(json.loads, reversed(lines)) if "time" in row)


def cost_rows(cfg, metrics: Dict[str, float]) -> Iterator[Row]:
    """Rows with each loss and its share, and with the time and memory of the whole run."""
    for name, value in metrics.items():
        if "loss" in name and name != "total_loss":
            share_of = value / metrics["total_loss"]
            yield name, f"{value:.4g}, {100 * share_of:.1f} % of the total loss"
    yield "shares", "are of the losses' values, not of their effect: `ssimkd weight` measures that"
    max_iter = setting(cfg, "iterations")
    seconds = round(metrics["time"] * max_iter)
    whole = f"{datetime.timedelta(seconds=seconds)} for {max_iter} iterations"
    waiting = f"{metrics['data_time']:.3g} s of it waiting for data"
    yield "time", f"{metrics['time']:.3g} s per iteration, {waiting}: {whole}"
    if device_of(cfg).type == "cuda":
        yield "memory", f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most, on the GPU"
    else:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on Linux
        yield "memory", f"{most / 2**20:.2f} GiB at most, of the whole process"


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    args = begin("check", words)
    remarks = collect_logs()
    rows: List[Row] = []
    costs: List[Row] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            cfg = load_config(args.config_file, args.opts)
            check_config(cfg, parse("train", []))  # as one process on this machine
            if isinstance(cfg, CfgNode):  # as SOLVER.REFERENCE_WORLD_SIZE demands in the long run
                cfg = DistillTrainer.auto_scale_workers(cfg, args.num_gpus)
            rows += pair_rows(build(cfg))
            if unlabeled_batch(cfg):
                names = ", ".join(names_of(cfg, "UNLABELED"))
                rows.append(("unlabeled", f"{unlabeled_batch(cfg)} images of {names} in a step"))
            metrics = measure(copy.deepcopy(cfg), folder, args.iterations, args.num_gpus)
            costs += cost_rows(cfg, metrics)
    finally:  # an error ends the command after what is known by then
        rows += [*dict.fromkeys(remarks.rows()), *costs]
        width = max((len(name) for name, _ in rows), default=0)
        print("".join(f"\n{name:<{width}}  {text}" for name, text in rows))
    sys.exit(any(name == "WARNING" for name, _ in rows))
