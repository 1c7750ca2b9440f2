"""The checkpoints of a run's model: written atomically, resumed from only if they are complete."""

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

from .coverage import first_three, unloaded_tensors
from .reader import NAMED, CheckpointReader, read_file
from .same_run import check_same_run

logger = logging.getLogger(__name__)
FINAL = "model_final.pth"
LAST = "last_checkpoint"
RESULTS = {"results.json", "inference"}  # of an evaluation
NUMBERED = re.compile(r"model_\d{7,}\.pth")  # These names sort by iteration.


class RunCheckpointer(CheckpointReader):
    """The checkpointer of a run. A crash at any moment leaves its earlier files as they were.

    Names and format are Detectron2's, so that stock Detectron2 reads the files. A checkpoint of
    another model, which would leave random values in this one, is an error.

    Args:
        key (str): of the config, which names the checkpoint. Errors of :meth:`resume_or_load` begin
            with it, or with "--resume".
        require_all (bool): a checkpoint must hold every tensor of the model. A resume always
            demands this. Otherwise missing tensors cause a warning; it is an error if all are
            missing or the backbone has other shapes.
        run (dict or None): the run's settings and teachers, see :func:`same_run.check_same_run`.
            They are kept in the checkpoints, and a resume compares them.
        model, save_dir, options: as for Detectron2's checkpointer.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        key: str = "",
        require_all: bool = False,
        run: Optional[Dict[str, Any]] = None,
        **options: Any,
    ) -> None:
        super().__init__(model, save_dir, **options)
        self.path_manager = AtomicPathManager()
        self.key, self.require_all, self.run = key, require_all, run
        self.resuming = False
        self.source = ""  # the checkpoint resumed from, until a newer one is written

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes a checkpoint as Detectron2 does.

        Raises:
            ConfigError: it cannot be written. The earlier checkpoints are unchanged.
        """
        self.source = ""
        with as_output_error(f"write {name}.pth to {self.save_dir}"):
            try:
                super().save(name, **kwargs, **({"run": self.run} if self.run else {}))
            except RuntimeError as error:
                # On a full disk torch's writer handles an OSError and raises this instead.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def has_checkpoint(self) -> bool:
        """Whether the folder has a checkpoint, complete or not."""
        return bool(checkpoints_in(self.save_dir))

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """Loads a checkpoint as Detectron2 does. A resume takes the last complete one.

        Raises:
            ConfigError: see :meth:`load`. On a resume also: no checkpoint is complete, it belongs
                to another model, optimizer or teacher, or the processes find different ones.
                Otherwise also: the run would overwrite its teacher's weights.
        """
        with as_config_error("--resume" if resume and self.has_checkpoint() else self.key):
            loaded = self._resume_or_load(path, resume)
        if not self.resuming:
            self._check_teachers()
        return loaded

    def _check_teachers(self) -> None:
        """Raises ConfigError if a new run would overwrite or move its teacher's weights."""
        for teacher in (self.run or {}).get("teachers", {}).values():
            folder, name = os.path.split(os.path.realpath(teacher["file"]))
            written = NUMBERED.fullmatch(name) or name in (FINAL, "student.pth")
            if written and folder == os.path.realpath(self.save_dir):
                raise ConfigError(
                    f"{OUTPUT}: {self.save_dir} holds the teacher's weights, {teacher['file']}, "
                    "which the new run would overwrite or move: name another folder"
                )

    def _resume_or_load(self, path: str, resume: bool) -> Dict[str, Any]:
        found = self._last_complete() if resume and self.has_checkpoint() else ""
        if resume and len(set(comm.all_gather(found))) > 1:
            raise ConfigError(
                f"{OUTPUT}: the processes see different checkpoints in {self.save_dir} (this one "
                f"sees {found or 'none'}); all processes must share the folder"
            )
        if resume and not found and comm.is_main_process():
            then = f"{path} is taken" if self.require_all else "the run starts anew"
            logger.warning("--resume: %s has no checkpoint, so %s", self.save_dir, then)
        self.resuming, self.source = bool(found), found
        if not found:
            if self.require_all and not path:
                raise ConfigError(f"empty, and {self.save_dir} has no checkpoint to resume from")
            return super().resume_or_load(path, resume=False)
        self.require_all = True
        return self.load(found)

    def write_final(self) -> None:
        """Writes `model_final` for a run that was interrupted after its last step.

        Detectron2's hook would write the file, but it acts after a step, and none is left.
        """
        if self.source and self.save_to_disk and os.path.basename(self.source) != FINAL:
            target = os.path.join(self.save_dir, FINAL)
            with open(self.source, "rb") as source, atomic_write(target) as file:
                shutil.copyfileobj(source, file)
            self.tag_last_checkpoint(FINAL)

    def _last_complete(self) -> str:
        names = checkpoints_in(self.save_dir)
        for name in names:
            path = os.path.join(self.save_dir, name)
            damage = find_damage(path)
            if not damage:
                return path
            logger.warning("%s is incomplete or damaged and is skipped: %s", path, damage)
        raise ConfigError(
            f"none of the checkpoints in {self.save_dir} is complete ({', '.join(names)}); "
            "start anew without --resume"
        )

    def move_earlier_run(self) -> None:
        """Moves an earlier run's checkpoints and results to a new folder.

        For a run that starts anew: no resume shall find them, and no report take them for its own.
        `model_final.pth` stays until the new run overwrites it.

        Raises:
            ConfigError: they cannot be moved.
        """
        comm.synchronize()  # another process may still be reading one of the files
        names = {LAST, *checkpoints_in(self.save_dir), *numbered_in(self.save_dir)} - {FINAL}
        names |= RESULTS
        names = {name for name in names if os.path.exists(os.path.join(self.save_dir, name))}
        if not names or not self.save_to_disk:
            return
        folder = os.path.join(self.save_dir, f"before-{datetime.now():%Y%m%d-%H%M%S-%f}")
        with as_output_error(f"move the files of an earlier run to {folder}"):
            os.mkdir(folder)
            for name in sorted(names):  # `last_checkpoint` comes before the checkpoints
                os.rename(os.path.join(self.save_dir, name), os.path.join(folder, name))
        logger.warning(
            "Without --resume: checkpoints and results of the earlier run are now in %s", folder
        )

    def _load_model(self, checkpoint):
        if self.resuming:
            absent = [key for key in self.checkpointables if key not in checkpoint]
            if absent:
                raise ConfigError(
                    f"holds weights without the state of their training ({', '.join(absent)}): "
                    "start a new run from them (MODEL.WEIGHTS or train.init_checkpoint)"
                )
            if self.run and "run" in checkpoint:
                check_same_run(checkpoint["run"], self.run)
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible) -> None:
        wrong = unloaded_tensors(incompatible)
        if wrong and self.require_all:
            raise ConfigError(f"does not fit the model: {first_three(list(wrong.values()))}")
        none = all(name in wrong for name, _ in self.model.named_parameters())
        # The heads may predict other classes, but the backbone must have the same shapes.
        other = [wrong[x[0]] for x in incompatible.incorrect_shapes if x[0].startswith("backbone.")]
        if none or other:
            raise ConfigError(f"is another model's: {first_three(other or list(wrong.values()))}")
        super()._log_incompatible_keys(incompatible)


class AtomicPathManager:
    """Detectron2's PathManager, but it writes files by :func:`atomic_write`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r") -> Any:
        """Opens a file; use it in a `with` statement."""
        return atomic_write(path, mode) if "w" in mode else PathManager.open(path, mode)


def checkpoints_in(folder: str) -> List[str]:
    """Names of the checkpoints to try in turn, which may be damaged or absent.

    The first is the one that `last_checkpoint` names, and older ones follow. Without a readable
    `last_checkpoint` the newest comes first.
    """
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
    """Names of a folder's checkpoints except the final one, the newest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(filter(NUMBERED.fullmatch, names), reverse=True)


def find_damage(path: str) -> str:
    """Why a checkpoint cannot be resumed from, or "" if it is complete. Reads every byte."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, but does not compare them.
            damaged = archive.testzip()
        if damaged:
            return f"{damaged} is damaged"
        read_file(path, mmap=True)
        return ""
    except Exception as error:  # A damaged header can raise anything.
        # The file is complete but names code. Loading it gives an error that says so.
        return "" if NAMED.search(str(error)) else one_line(error)
