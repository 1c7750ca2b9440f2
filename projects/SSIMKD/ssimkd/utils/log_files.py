"""The log files of a run."""

import logging
import os
from contextlib import contextmanager
from typing import Iterator, List


def log_traceback(error: BaseException) -> List[str]:
    """Writes an error's traceback to the log files, not to the terminal; returns their paths."""
    record = logging.LogRecord(
        *("ssimkd", logging.ERROR, __file__, 0, "The run ends with an error:", None),
        exc_info=(type(error), error, error.__traceback__),
    )
    paths: List[str] = []
    for name in ("detectron2", "ssimkd"):
        for handler in log_files(name):
            if handler.stream.name not in paths:  # several loggers may write to one file
                handler.handle(record)
                paths.append(handler.stream.name)
    return paths


def log_files(name: str) -> Iterator[logging.StreamHandler]:
    """A logger's handlers that write to files."""
    for handler in logging.getLogger(name).handlers:
        path = getattr(getattr(handler, "stream", None), "name", None)
        if isinstance(path, str) and os.path.isfile(path):  # a terminal's is "<stdout>"
            yield handler  # type: ignore[misc]


@contextmanager
def without_warnings(name: str) -> Iterator[None]:
    """In this block a logger and those below it pass errors alone."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
