"""Checkpoints of a run: written whole or not at all, and gone on from only where they are whole."""

import logging
import os
import re
import shutil
import zipfile
from datetime import datetime
from typing import Any, Dict, List, Optional

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from ssimkd.errors import OUTPUT, ConfigError, as_config_error, as_output_error, one_line
from ssimkd.utils.atomic import atomic_write
from ssimkd.utils.random_state import preserve_random_state, set_random_state

from .reader import NAMED, read_raw
from .same_run import check_same_run
from .strict import StrictCheckpointer

logger = logging.getLogger(__name__)
FINAL = "model_final.pth"
LAST = "last_checkpoint"
NUMBERED = re.compile(r"model_\d{7,}\.pth")  # names sort as their iterations do


class RunCheckpointer(StrictCheckpointer):
    """A run's checkpointer, whose files survive a crash at any moment.

    Names and format are Detectron2's; stock Detectron2 reads the files.

    Args:
        model (nn.Module): as Detectron2's.
        save_dir (str): as Detectron2's.
        run (dict or None): what `same_run.describe_run` says of this run: it is kept in the
            checkpoints, and a resume compares it.
        options: as :class:`StrictCheckpointer`'s.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        run: Optional[Dict[str, Any]] = None,
        **options: Any,
    ) -> None:
        super().__init__(model, save_dir, **options)
        self.path_manager = AtomicPathManager()
        self.run = run
        self.resuming = False
        self.source = ""  # what was resumed from, until something is saved

    def save(self, name: str, **kwargs: Any) -> None:
        """As Detectron2's.

        Raises:
            ConfigError: it cannot be written; the checkpoints before it are as they were.
        """
        self.source = ""
        with as_output_error(f"write {name}.pth to {self.save_dir}"):
            try:
                super().save(name, **kwargs, **({"run": self.run} if self.run else {}))
            except RuntimeError as error:
                # torch's writer ends in an error of its own, on the way from the one that matters
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from, whole or not."""
        return bool(checkpoints_in(self.save_dir))

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """As Detectron2's; goes on from the last whole checkpoint.

        Raises:
            ConfigError: none is whole, it is not one of this model and optimizer or of these
                teachers, or the processes do not see the same; or see :meth:`load`.
        """
        found = self._last_whole() if resume and self.has_checkpoint() else ""
        if resume and len(set(comm.all_gather(found))) > 1:
            raise ConfigError(
                f"{OUTPUT}: the processes see different checkpoints in {self.save_dir}, "
                f"this one {found or 'none'}: it has to be a folder that all of them share"
            )
        self.resuming, self.source = bool(found), found
        if not found:
            if self.whole and not path:
                raise ConfigError(f"empty, and {self.save_dir} has no checkpoint to go on from")
            return super().resume_or_load(path, resume=False)
        self.whole = True
        return self.load(found)

    def complete(self) -> None:
        """Writes `model_final` where a crash came just before it: no step was left to take."""
        if self.source and self.save_to_disk and os.path.basename(self.source) != FINAL:
            target = os.path.join(self.save_dir, FINAL)
            with open(self.source, "rb") as source, atomic_write(target) as file:
                shutil.copyfileobj(source, file)
            self.tag_last_checkpoint(FINAL)

    def _last_whole(self) -> str:
        names = checkpoints_in(self.save_dir)
        for name in names:
            path = os.path.join(self.save_dir, name)
            fault = find_damage(path)
            if not fault:
                return path
            logger.warning("%s is not whole and is left out: %s", path, fault)
        raise ConfigError(
            f"none of the checkpoints in {self.save_dir} is whole ({', '.join(names)}); "
            "start anew without --resume"
        )

    def move_earlier_checkpoints(self) -> None:
        """Moves an earlier run's checkpoints to a folder of their own: no resume is to find them.

        For a run that starts anew; `model_final.pth` stays where it is until it is written over.

        Raises:
            ConfigError: they cannot be moved.
        """
        names = {LAST, *checkpoints_in(self.save_dir), *numbered_in(self.save_dir)} - {FINAL}
        names = {name for name in names if os.path.isfile(os.path.join(self.save_dir, name))}
        if not names or not self.save_to_disk:
            return
        folder = os.path.join(self.save_dir, f"before-{datetime.now():%Y%m%d-%H%M%S-%f}")
        with as_output_error(f"move the checkpoints of an earlier run to {folder}"):
            os.mkdir(folder)
            for name in sorted(names):  # `last_checkpoint` first
                os.rename(os.path.join(self.save_dir, name), os.path.join(folder, name))
        logger.warning("Without --resume: the earlier run's checkpoints are now in %s", folder)

    def _load_model(self, checkpoint):
        if self.resuming:
            absent = [key for key in self.checkpointables if key not in checkpoint]
            if absent:
                raise ConfigError(
                    f"holds weights without the state of their training ({', '.join(absent)}): "
                    "start a new run from them (MODEL.WEIGHTS or train.init_checkpoint)"
                )
            check_state(checkpoint)
            if self.run and "run" in checkpoint:
                check_same_run(checkpoint["run"], self.run)
        return super()._load_model(checkpoint)


def checkpoints_in(folder: str) -> List[str]:
    """Names of the checkpoint that a folder's `last_checkpoint` gives and of those before it.

    Where it gives none, the newest comes first; the files need not be whole, nor be there.
    """
    if not os.path.isdir(folder):
        return []
    try:
        with open(os.path.join(folder, LAST), encoding="utf-8") as f:
            last = os.path.basename(f.read().strip())
    except (OSError, UnicodeDecodeError):
        last = ""
    numbered = numbered_in(folder)
    if NUMBERED.fullmatch(last):
        numbered = [name for name in numbered if name < last]
    return [last, *numbered] if last else numbered


def numbered_in(folder: str) -> List[str]:
    """Names of a folder's checkpoints but for the final one, the newest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(filter(NUMBERED.fullmatch, names), reverse=True)


def check_state(checkpoint: Dict[str, Any]) -> None:
    """Raises ConfigError for a state of the training that would fail, or end it, later on."""
    trainer = checkpoint.get("trainer")
    if not isinstance(trainer, dict) or "iteration" not in trainer:
        return  # not this project's
    iteration = trainer["iteration"]
    if type(iteration) is not int or iteration != checkpoint.get("iteration", iteration):
        raise ConfigError(f"is damaged: its iteration is {iteration!r}")
    exact = trainer.get("hooks", {}).get("ExactResume")
    if exact is None:
        return
    if type(exact.get("data", {"batches": 0})["batches"]) is not int:
        raise ConfigError("is damaged: its place in the training data is no number")
    with preserve_random_state():
        for state in exact["random"]:
            with as_config_error("is damaged: its random state cannot be restored", Exception):
                set_random_state(state)


class AtomicPathManager:
    """Detectron2's PathManager, except that what it opens for writing is a :func:`atomic_write`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r") -> Any:
        """A context manager of the file."""
        return atomic_write(path, mode) if "w" in mode else PathManager.open(path, mode)


def find_damage(path: str) -> str:
    """Why a checkpoint is not whole, in words; "" of a whole one: every byte is checked."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes the sums, but does not read them
            damaged = archive.testzip()
        if not damaged:
            read_raw(path, mmap=True)  # what Python's reader passes over, torch's may refuse
    except Exception as error:  # a damaged header can raise anything
        # a whole file that is not trusted is an error of its own
        return "" if NAMED.search(str(error)) else one_line(error)
    return f"{damaged} is damaged" if damaged else ""
