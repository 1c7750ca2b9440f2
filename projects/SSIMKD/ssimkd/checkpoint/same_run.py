"""What a run that is resumed has changed: its settings and its teachers' files."""

import logging
import re
from typing import Any, Iterator, Mapping, Tuple

from ssimkd.errors import ConfigError

logger = logging.getLogger(__name__)


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Compares the run that wrote a checkpoint with the run that continues from it.

    One warning lists the settings that differ. Other teachers are an error, since a student of two
    teachers in turn is a result of neither. Adding teachers to a run without any is allowed, and so
    is removing all.

    Args:
        old, new (mapping): "settings" maps keys to values in words, "teachers" maps keys to
            mappings of "file" and "sha256".

    Raises:
        ConfigError: the teachers' files differ. The caller puts the checkpoint's name before it.
    """
    before, now = old["settings"], new["settings"]
    changed = [
        f"{key} was {before.get(key, 'not set')} and is now {now.get(key, 'not set')}"
        for key in sorted({**before, **now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        logger.warning("--resume: these settings have changed: %s", "; ".join(changed))
    # Keys are not compared: the same teacher can be TEACHER or one of TEACHERS.
    before, now = (
        {teacher["sha256"]: teacher["file"] for teacher in run["teachers"].values()}
        for run in (old, new)
    )
    if before and now and set(before) != set(now):
        raise ConfigError(
            f"is another run's: its teachers were {list_files(before)} and are now "
            f"{list_files(now)}; put the files back, or start a new run from this checkpoint's "
            "weights (MODEL.WEIGHTS or train.init_checkpoint)"
        )


def list_files(teachers: Mapping[str, str]) -> str:
    """Files as text, from their names by the SHA-256 of their contents."""
    return ", ".join(f"{file} (SHA-256 {digest[:12]}...)" for digest, file in teachers.items())


def flatten(node: Any, prefix: str = "") -> Iterator[Tuple[str, str]]:
    """Nested settings as pairs of a dotted key, which begins with the prefix, and text.

    The text of a function or an object is its name, without its address in memory.
    """
    if isinstance(node, Mapping) and node:
        items: Any = node.items()
    elif isinstance(node, (list, tuple)) and any(isinstance(x, (Mapping, list)) for x in node):
        items = enumerate(node)
    else:
        yield prefix, getattr(node, "__qualname__", None) or re.sub(r" at 0x\w+", "", repr(node))
        return
    for key, value in items:
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
