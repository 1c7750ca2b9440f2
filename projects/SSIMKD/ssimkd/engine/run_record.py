"""Writes how a run was made to `run.json` in its folder, and describes it for its checkpoints."""

import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch import nn

from ssimkd.checkpoint.reader import sha256
from ssimkd.checkpoint.same_run import flatten
from ssimkd.data.datasets import categories_of
from ssimkd.errors import as_output_error, one_line
from ssimkd.modeling.several_teachers import distillers_of
from ssimkd.utils.atomic import atomic_write
from ssimkd.utils.user_code import IMPORTED, import_user_code

from .preemption import EXIT_STATUS, INTERRUPTED

logger = logging.getLogger(__name__)
STOPPED = (EXIT_STATUS, INTERRUPTED)  # after a signal and a checkpoint
FILE = "run.json"
PACKAGES = ("ssimkd", "detectron2", "torch", "torchvision", "numpy")


def describe_run(cfg, model: nn.Module) -> Dict[str, Any]:
    """The description of a run that its checkpoints hold.

    Args:
        cfg (CfgNode or DictConfig): the run's config.
        model (nn.Module): a student, or a plain detector, which has no teachers.

    Returns:
        dict: "settings", key -> value in words; "teachers", key -> "file" and its "sha256";
        "categories", see :func:`categories_of`.
    """
    categories = categories_of(cfg)
    if not isinstance(cfg, CfgNode):
        cfg = OmegaConf.to_container(cfg)
    teachers = {}
    for name, distiller in distillers_of(model):
        if distiller.enabled:
            key = f"MODEL.DISTILL.TEACHERS, {name}" if name else "MODEL.DISTILL.TEACHER.WEIGHTS"
            path = distiller.spec.find_weights()
            teachers[key] = {"file": path, "sha256": sha256(path)}
    return {"settings": dict(flatten(cfg)), "teachers": teachers, "categories": categories}


@contextmanager
def record_run(folder: str, test: Sequence[str], evaluates: bool = False) -> Iterator[None]:
    """Adds a run's command, data, times, commit, versions and machine to `run.json`.

    Resuming or evaluating a run adds another entry. Its "ended" is None and its "outcome" is
    "running" until the process ends; a process that is killed leaves them so.

    Args:
        folder (str): the run's folder, which exists. Only the main process writes to it.
        test (sequence[str]): the data sets that the run evaluates on.
        evaluates (bool): the run trains nothing.
    """
    if not comm.is_main_process():
        yield
        return
    entry: Dict[str, Any] = {
        "command": command_line(sys.argv),
        "folder": os.getcwd(),
        "processes": comm.get_world_size(),
        "test": list(test),
        "evaluates": evaluates,
        "started": now(),
        "ended": None,
        "outcome": "running",
        "commit": commit(),
        "versions": {"python": platform.python_version(), **versions()},
        "machine": machine(),
        "imports": list(IMPORTED),
    }
    place, path = len(read_record(folder)), os.path.join(folder, FILE)
    with as_output_error(f"write {FILE} to {folder}"):
        if not place and os.path.exists(path):  # it could not be read
            os.replace(path, f"{path}.unreadable")
    write(folder, place, entry)
    try:
        yield
        entry["outcome"] = "finished"
    except SystemExit as end:
        entry["outcome"] = "stopped" if end.code in STOPPED else f"failed: {end.code}"
        raise
    except KeyboardInterrupt:
        entry["outcome"] = "stopped at once, without a checkpoint"
        raise
    except Exception as error:
        entry["outcome"] = f"failed: {one_line(error)}"
        raise
    finally:
        entry["ended"] = now()
        write(folder, place, entry)


@contextmanager
def keep_config(folder: str, evaluates: bool = False) -> Iterator[None]:
    """Puts the `config.yaml` of an earlier run back after a command that trained nothing.

    Detectron2 writes the file at the start of every command. It belongs to the checkpoints beside
    it, which an evaluation, or a run that fails at its start, leaves as they are. In a folder
    without checkpoints it belongs to the last evaluation.

    Args:
        folder (str): the run's folder.
        evaluates (bool): the command trains nothing, although a training may go on in the folder.
    """
    path = os.path.join(folder, "config.yaml")
    before, earlier = trained_files(folder), ""
    if comm.is_main_process() and os.path.isfile(path):
        earlier = Path(path).read_text()
    try:
        yield
    finally:
        if earlier and before and (evaluates or trained_files(folder) == before):
            with atomic_write(path, "w") as file:
                file.write(earlier)


def trained_files(folder: str) -> Dict[str, int]:
    """The files that a training writes: name -> time of the last change."""
    paths = [*Path(folder).glob("*.pth"), *Path(folder).glob("metrics.json")]
    return {path.name: path.stat().st_mtime_ns for path in paths}


def read_record(folder: str) -> List[Dict[str, Any]]:
    """The entries of a folder's `run.json`, oldest first; none if it cannot be read."""
    path = os.path.join(folder, FILE)
    if not os.path.exists(path):
        return []
    try:
        with open(path) as f:
            entries = json.load(f)
        if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            return entries
        reason = "it is not a list of entries"
    except (OSError, ValueError) as error:
        reason = one_line(error)
    logger.warning("%s cannot be read and is left out: %s", path, reason)
    return []


def command_line(words: List[str]) -> str:
    """What a user types to run this process again, in the same folder."""
    own = os.path.basename(words[0]) in ("ssimkd", "__main__.py")  # python -m ssimkd
    return shlex.join(["ssimkd", *words[1:]] if own else ["python", *words])


def import_recorded(folder: str) -> None:
    """Imports the modules (--import) of the runs in a folder; nothing without a `run.json`."""
    for entry in read_record(folder):
        import_user_code(entry.get("imports", []), f"--import, of {os.path.join(folder, FILE)}")


def import_of_file(path: str) -> None:
    """Imports the modules of the run in whose folder this config or checkpoint lies.

    Nothing is imported for "" or a URL.
    """
    if path and "://" not in path:
        import_recorded(os.path.dirname(os.path.abspath(path)))


def in_words(time: str) -> str:
    """An entry's "started" or "ended" as people write it."""
    return f"{datetime.fromisoformat(time):%d %b %Y, %H:%M} UTC"


def end_of(entry: Dict[str, Any]) -> str:
    """How and when the run of an entry ended, in words."""
    if not entry["ended"]:
        return "has not ended, or was killed"
    outcome = entry.get("outcome", "finished")
    hint = "; --resume continues it" if outcome == "stopped" else ""
    return f"{outcome}, {in_words(entry['ended'])}{hint}"


def write(folder: str, place: int, entry: Dict[str, Any]) -> None:
    """Puts an entry at its place in `run.json`. An interruption leaves the former file.

    The other entries are read anew, because an evaluation may have added one in the meantime.
    """
    entries = read_record(folder)
    entries[place : place + 1] = [entry]
    with (
        as_output_error(f"write {FILE} to {folder}"),
        atomic_write(os.path.join(folder, FILE), "w") as f,
    ):
        json.dump(entries, f, indent=2)


def now() -> str:
    """Time of day in UTC, ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> Optional[str]:
    """Commit of this package's source, with "-dirty" if it was changed; None outside of git."""
    folder, name = os.path.split(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", folder, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", name)  # an installed copy may lie in another repository
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> Dict[str, str]:
    """Name -> version of the installed packages on which the results depend."""
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return {name: found[name] for name in PACKAGES if name in found}


def machine() -> str:
    """Processor, cores and GPUs, in words; a run's time depends on them."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    gpus = torch.cuda.device_count()
    also = [f"{gpus} x {torch.cuda.get_device_name(0)}"] if gpus else []
    return ", ".join([processor, f"{os.cpu_count()} cores", *also])
