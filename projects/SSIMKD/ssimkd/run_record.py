"""What a run leaves about itself: `run.json` in its folder."""

import json
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
from typing import Any, Dict, Iterator, List, Optional

import torch
from detectron2.utils import comm

from .errors import ConfigError

FILE = "run.json"
PACKAGES = ("ssimkd", "detectron2", "torch", "torchvision", "numpy")


@contextmanager
def record_run(folder: str) -> Iterator[None]:
    """Around a run: adds its command, time, commit, versions and machine to `run.json`.

    A run that is resumed or evaluated later adds an entry of its own; one that fails has no end.

    Args:
        folder (str): the run's; it exists. Only the main process writes.
    """
    if not comm.is_main_process():
        yield
        return
    entry: Dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "started": now(),
        "ended": None,
        "commit": commit(),
        "versions": {"python": platform.python_version(), **versions()},
        "machine": machine(),
    }
    entries = [*read_record(folder), entry]
    write(folder, entries)
    yield
    entry["ended"] = now()
    write(folder, entries)


def read_record(folder: str) -> List[Dict[str, Any]]:
    """The entries of a folder's `run.json`, oldest first; none where there is no such file."""
    path = os.path.join(folder, FILE)
    return read_json(path) if os.path.isfile(path) else []


def read_json(path: str) -> Any:
    """What a file of a run holds.

    Raises:
        ConfigError: it is no JSON, as where its writing was interrupted.
    """
    with open(path) as f:
        try:
            return json.load(f)
        except ValueError as error:
            raise ConfigError(f"{path} is no whole JSON: {error}") from error


def in_words(time: Optional[str]) -> str:
    """An entry's "started" or "ended" for people; None: it has no end."""
    if time is None:
        return "not ended, or failed"
    return f"{datetime.fromisoformat(time):%d %b %Y, %H:%M} UTC"


def write(folder: str, entries: List[Dict[str, Any]]) -> None:
    """Replaces `run.json` at once: an interruption leaves the former one."""
    path = os.path.join(folder, FILE)
    with open(path + ".tmp", "w") as f:
        json.dump(entries, f, indent=2)
    os.replace(path + ".tmp", path)


def now() -> str:
    """Time of day in UTC, ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> Optional[str]:
    """Commit of this package's source, with "-dirty" where it was changed; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def versions() -> Dict[str, str]:
    """Of the installed packages that decide a run."""
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return {name: found[name] for name in PACKAGES if name in found}


def machine() -> str:
    """Processor, cores and GPUs, in words: what a run's time depends on."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    gpus = torch.cuda.device_count()
    also = [f"{gpus} x {torch.cuda.get_device_name(0)}"] if gpus else []
    return ", ".join([processor, f"{os.cpu_count()} cores", *also])
