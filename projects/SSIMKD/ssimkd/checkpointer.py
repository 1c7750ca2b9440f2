"""Checkpoints of a run: written whole or not at all, and gone on from only where they are whole."""

import logging
import os
import re
import shutil
import zipfile
from contextlib import contextmanager, suppress
from typing import IO, Any, Dict, Iterator, List, Optional

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from .checkpoint import RunCheckpointer
from .errors import ConfigError, one_line
from .same_run import check_same_run

logger = logging.getLogger(__name__)
FINAL = "model_final.pth"
NUMBERED = re.compile(r"model_\d{7,}\.pth")  # names sort as their iterations do


class WholeCheckpointer(RunCheckpointer):
    """A run's checkpointer, whose files survive a crash at any moment.

    Names and format are Detectron2's; stock Detectron2 reads the files.

    Args:
        model (nn.Module): as Detectron2's.
        save_dir (str): as Detectron2's.
        run (dict or None): what `same_run.describe_run` says of this run: it is kept in the
            checkpoints, and a resume compares it.
        options: as :class:`RunCheckpointer`'s.
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
        self.path_manager = WholeFiles()
        self.run = run
        self.resuming = False
        self.source = ""  # what was resumed from, until something is saved

    def save(self, name: str, **kwargs: Any) -> None:
        """As Detectron2's.

        Raises:
            ConfigError: it cannot be written; the checkpoints before it are as they were.
        """
        self.source = ""
        try:
            super().save(name, **kwargs, **({"run": self.run} if self.run else {}))
        except (OSError, RuntimeError) as error:
            # torch's writer ends in an error of its own, on the way from the one that matters
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise ConfigError(
                f"OUTPUT_DIR (.yaml) or train.output_dir (.py): cannot write {name}.pth to "
                f"{self.save_dir}: {one_line(cause)}"
            ) from error

    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from, whole or not."""
        return bool(self._newest_first())

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """As Detectron2's; goes on from the last whole checkpoint.

        Raises:
            ConfigError: none is whole, it is not one of this model and optimizer or of these
                teachers, or the processes do not see the same; or see :meth:`load`.
        """
        found = self._last_whole() if resume and self.has_checkpoint() else ""
        if resume and len(set(comm.all_gather(found))) > 1:
            raise ConfigError(
                f"OUTPUT_DIR (.yaml) or train.output_dir (.py): the processes see different "
                f"checkpoints in {self.save_dir}, this one {found or 'none'}: it has to be a "
                "folder that all of them share"
            )
        self.resuming, self.source = bool(found), found
        if not found:
            return super().resume_or_load(path, resume=False)
        self.whole = True
        return self.load(found)

    def complete(self) -> None:
        """Writes `model_final` where a crash came just before it: no step was left to take."""
        if self.source and self.save_to_disk and os.path.basename(self.source) != FINAL:
            target = os.path.join(self.save_dir, FINAL)
            with open(self.source, "rb") as source, whole_file(target) as file:
                shutil.copyfileobj(source, file)
            self.tag_last_checkpoint(FINAL)

    def _newest_first(self) -> List[str]:
        """Names of the checkpoint that `last_checkpoint` gives and of those before it."""
        if not os.path.isdir(self.save_dir):
            return []
        last = os.path.basename(self.get_checkpoint_file())
        numbered = sorted(filter(NUMBERED.fullmatch, os.listdir(self.save_dir)), reverse=True)
        if NUMBERED.fullmatch(last):
            numbered = [name for name in numbered if name < last]
        return [last, *numbered] if last else numbered

    def _last_whole(self) -> str:
        names = self._newest_first()
        for name in names:
            path = os.path.join(self.save_dir, name)
            fault = fault_of(path)
            if not fault:
                return path
            logger.warning("%s is not whole and is left out: %s", path, fault)
        raise ConfigError(
            f"none of the checkpoints in {self.save_dir} is whole ({', '.join(names)}); "
            "start anew without --resume"
        )

    def _load_model(self, checkpoint):
        if self.resuming and self.run and "run" in checkpoint:
            check_same_run(checkpoint["run"], self.run)
        return super()._load_model(checkpoint)


class WholeFiles:
    """Detectron2's PathManager, except that what it opens for writing is a :func:`whole_file`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r") -> Any:
        """A context manager of the file."""
        return whole_file(path, mode) if "w" in mode else PathManager.open(path, mode)


@contextmanager
def whole_file(path: str, mode: str = "wb") -> Iterator[IO]:
    """Opens a file that takes its name, and the place of an older one, once it is on the disk."""
    draft = f"{path}.tmp"
    try:
        with open(draft, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            os.remove(draft)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot; then the name may come late
            os.fsync(folder)
    finally:
        os.close(folder)


def fault_of(path: str) -> str:
    """Why a checkpoint is not whole, in words; "" of a whole one: every byte is checked."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes the sums, but does not read them
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return one_line(error)
    return f"{damaged} is damaged" if damaged else ""
