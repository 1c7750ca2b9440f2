"""What tells one run from another: its settings and its teachers' files."""

import hashlib
import logging
import re
from typing import Any, Callable, Iterator, Mapping, Tuple

from ssimkd.errors import ConfigError

logger = logging.getLogger(__name__)
# Settings that may change without another word: where a run lies, and how fast it reads.
FREE = re.compile(r"OUTPUT_DIR|train\.output_dir|.*NUM_WORKERS|.*\.num_workers")


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Compares what a checkpoint keeps with the run that goes on from it.

    Every setting that differs, of the run or of a teacher, is a warning. Another optimizer cannot
    go on from the state of the first, and a student that was taught by two teachers in turn is no
    result of either.

    Raises:
        ConfigError: a teacher's file or the kind of optimizer has changed; to be put after the
            checkpoint's name.
    """
    for key, before, now in differences(old["settings"], new["settings"]):
        if key == "optimizer._target_":
            raise ConfigError(
                f"is another run's: {key} was {before} and is now {now}: their states differ"
            )
        logger.warning("--resume: %s was %s and is now %s", key, before, now)
    # whatever the keys are: one teacher may be named in two ways
    taught = {teacher["sha256"]: teacher for teacher in old["teachers"].values()}
    for name, teacher in new["teachers"].items() if taught else ():
        if teacher["sha256"] not in taught:
            files = ", ".join(
                f"{x['file']}, SHA-256 {x['sha256'][:12]}..." for x in taught.values()
            )
            raise ConfigError(
                f"is another run's: {name}: {teacher['file']} (SHA-256 "
                f"{teacher['sha256'][:12]}...) is not the file that has taught so far ({files}): "
                "put that back, or start a new run from this checkpoint's weights (MODEL.WEIGHTS "
                "or train.init_checkpoint)"
            )
        config = taught[teacher["sha256"]].get("config", teacher["config"])
        for key, before, now in differences(config, teacher["config"]):
            logger.warning("--resume: the teacher's %s was %s and is now %s", key, before, now)
    kept = {teacher["sha256"] for teacher in new["teachers"].values()}
    for name, teacher in old["teachers"].items() if kept else ():
        if teacher["sha256"] not in kept:
            raise ConfigError(
                f"is another run's: {name}: {teacher['file']} has taught so far and is gone"
            )


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[Tuple[str, str, str]]:
    """Settings that differ, but for those that may: key, value before, value now."""
    for key in sorted({**old, **new}):
        before, now = old.get(key, "not set"), new.get(key, "not set")
        if before != now and not FREE.fullmatch(key):
            yield key, before, now


def flatten(
    node: Any,
    prefix: str = "",
    words: Callable[[Any], str] = repr,
    split: Tuple[type, ...] = (Mapping, list),
) -> Iterator[Tuple[str, str]]:
    """Nested settings as pairs of a dotted key and the value in words.

    Args:
        node (mapping or any): the settings.
        prefix (str): of the keys.
        words (callable): a value -> it in words.
        split (tuple[type]): a list that holds one of these has a pair for each item.
    """
    if isinstance(node, Mapping) and node:
        items: Any = node.items()
    elif isinstance(node, (list, tuple)) and any(isinstance(x, split) for x in node):
        items = enumerate(node)
    else:
        # functions and objects: their name, not where in memory they lie
        text = getattr(node, "__qualname__", None) or re.sub(r" at 0x\w+", "", words(node))
        yield prefix, text
        return
    for key, value in items:
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key), words, split)


def sha256(path: str) -> str:
    """Of a file's bytes, as a hexadecimal number."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
