"""Where a run writes its progress: the terminal, log.txt, and Weights & Biases."""

import logging
import os
import sys
from contextlib import contextmanager, redirect_stdout
from typing import Iterator

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ssimkd.errors import as_config_error
from ssimkd.utils.log_files import log_files

LOGGERS = ("detectron2", "fvcore", "ssimkd")


@contextmanager
def wandb_run(project: str, folder: str) -> Iterator[None]:
    """Sends what the main process writes for TensorBoard to Weights & Biases as well.

    Args:
        project (str): the project in Weights & Biases; "" leaves it out.
        folder (str): the run's folder; the run in Weights & Biases has the folder's name.

    Raises:
        ConfigError: wandb cannot be imported.
    """
    if not (project and comm.is_main_process()):
        yield
        return
    with as_config_error("MODEL.DISTILL.WANDB_PROJECT: pip install wandb", ImportError):
        import wandb
    name = os.path.basename(os.path.abspath(folder))
    with wandb.init(project=project, name=name, dir=folder, sync_tensorboard=True):
        yield


@contextmanager
def quiet_terminal(folder: str, rank: int) -> Iterator[None]:
    """Shows warnings, results and progress on the terminal. log.txt has every line.

    Args:
        folder (str): the run's folder, in which log.txt is.
        rank (int): this process's rank.
    """
    shown = ("detectron2.evaluation.testing", "detectron2.utils.events")
    # Detectron2's default_setup comes later, and keeps the loggers that these calls set up
    setup_logger(folder, distributed_rank=rank)
    for name in LOGGERS[1:]:
        setup_logger(folder, distributed_rank=rank, name=name)
    for name in LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.addFilter(lambda r: r.levelno >= logging.WARNING or r.name in shown)
    with redirect_stdout(next(log_files("detectron2")).stream):  # pycocotools prints
        yield
