"""What a run shows on the terminal, and in Weights & Biases."""

import logging
import os
import sys
from contextlib import contextmanager, redirect_stdout
from typing import Iterator

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ssimkd.errors import as_config_error, log_files

LOGGERS = ("detectron2", "fvcore", "ssimkd")


@contextmanager
def wandb_run(project: str, folder: str) -> Iterator[None]:
    """Around a training: what its main process writes for TensorBoard goes to Weights & Biases too.

    Args:
        project (str): the run's project there; "" leaves it out.
        folder (str): of the run, which gets its name.

    Raises:
        ConfigError: wandb cannot be imported.
    """
    if not (project and comm.is_main_process()):
        yield
        return
    with as_config_error(
        "MODEL.DISTILL.WANDB_PROJECT (train.wandb_project): pip install wandb", ImportError
    ):
        import wandb
    name = os.path.basename(os.path.abspath(folder))
    with wandb.init(project=project, name=name, dir=folder, sync_tensorboard=True):
        yield


@contextmanager
def quiet_terminal(folder: str, rank: int) -> Iterator[None]:
    """Around a run: warnings, results and progress are on the terminal; log.txt has everything.

    Args:
        folder (str): of log.txt, as Detectron2's `default_setup` will name it, which comes later.
        rank (int): of this process.
    """
    shown = ("detectron2.evaluation.testing", "detectron2.utils.events")
    # the calls of default_setup: it will find these loggers
    setup_logger(folder, distributed_rank=rank)
    for name in LOGGERS[1:]:
        setup_logger(folder, distributed_rank=rank, name=name)
    for name in LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.addFilter(lambda r: r.levelno >= logging.WARNING or r.name in shown)
    with redirect_stdout(next(log_files("detectron2")).stream):  # pycocotools prints
        yield
