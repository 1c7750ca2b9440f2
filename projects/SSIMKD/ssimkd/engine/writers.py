"""Where a run's figures go: the terminal, Detectron2's files and, if asked, Weights & Biases."""

import logging
import os
import sys
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Iterator, List, Optional

from detectron2.engine import default_writers
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from detectron2.utils.logger import setup_logger
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ssimkd.errors import as_config_error, log_files

LOGGERS = ("detectron2", "fvcore", "ssimkd")
RATE = "images_per_second"
WINDOW = 20  # iterations over which figures are smoothed, as Detectron2's writers do


def build_writers(folder: str, max_iter: int, batch_size: int) -> List[EventWriter]:
    """Detectron2's writers, with images per second, and a bar where there is a terminal.

    Args:
        folder (str): of metrics.json and TensorBoard's events.
        max_iter (int): iterations of the run.
        batch_size (int): images per iteration, of all processes; 0: unknown.
    """
    printer, *files = default_writers(folder, max_iter)
    printer.logger = WithRate(printer.logger, {})
    return [ImagesPerSecond(batch_size), printer, ProgressBar(max_iter), *files]


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
    shown = ["detectron2.evaluation.testing"]
    if not sys.stderr.isatty():  # there is no bar
        shown.append("detectron2.utils.events")
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


class ImagesPerSecond(EventWriter):
    """Adds the images per second of the last iterations to the figures, without the time of hooks.

    Args:
        batch_size (int): images per iteration; 0: unknown.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def write(self) -> None:
        """Comes before the writers that show the figure."""
        storage = get_event_storage()
        _, timed = storage.latest().get("time", (0.0, None))
        if self.batch_size and timed == storage.iter:  # not the first iterations, nor the end
            seconds = storage.history("time").median(WINDOW)
            storage.put_scalar(RATE, self.batch_size / seconds, smoothing_hint=False)


def rate_text() -> str:
    """The latest rate in words; "" where there is none."""
    latest = get_event_storage().latest()
    return f"{latest[RATE][0]:.1f} images/s" if RATE in latest else ""


class WithRate(logging.LoggerAdapter):
    """Adds the rate to the lines of Detectron2's printer, which takes no figure but its own."""

    def process(self, msg, kwargs):
        """The line that is logged."""
        return f"{msg}  {rate_text()}".rstrip(), kwargs


class ProgressBar(EventWriter):
    """A progress bar below the log, with the remaining time, losses and images per second.

    There is none unless stderr is a terminal.

    Args:
        max_iter (int): iterations of the run.
    """

    def __init__(self, max_iter: int) -> None:
        self.max_iter = max_iter
        self.bar: Optional[tqdm] = None
        self.opened = ExitStack()

    def write(self) -> None:
        """Moves the bar. The first call makes it, so a resumed run does not start at 0."""
        storage = get_event_storage()
        done = min(storage.iter + 1, self.max_iter)
        if self.bar is None:
            self.bar = tqdm(total=self.max_iter, initial=done, disable=None, dynamic_ncols=True)
            if not self.bar.disable:
                loggers = [logging.getLogger(name) for name in LOGGERS]
                self.opened.enter_context(logging_redirect_tqdm(loggers))
        losses = [
            f"{name} {history.median(WINDOW):.4g}"
            for name, history in storage.histories().items()
            if name == "total_loss" or "_kd_loss" in name
        ]
        self.bar.set_postfix_str(", ".join([*losses, rate_text()]), refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Gives the terminal back to the loggers."""
        if self.bar is not None:
            self.bar.close()
        self.opened.close()
