"""The one exception for input that a user can mend."""

import re
import sys
from contextlib import contextmanager
from typing import Iterator

from omegaconf.errors import OmegaConfBaseException

# How a traceback names what a user can mend.
WORKER = re.compile(r"^(ssimkd\.\w+\.\w+|FloatingPointError): ")


class ConfigError(ValueError):
    """Wrong settings, files or data: one line that names the key, file or level to change."""

    def __init__(self, text: str = "") -> None:
        lines = text.strip().splitlines()
        if text.startswith("Caught "):  # torch's, from a data worker: its traceback, then the line
            lines = [WORKER.sub("", lines[-1])]
        super().__init__(" ".join(lines))


# What a user can mend: a FloatingPointError says which loss or map is not finite.
MENDABLE = (ConfigError, FloatingPointError, OmegaConfBaseException)


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def in_user_terms(error: BaseException) -> str:
    """One of MENDABLE as one line that names what to change."""
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key or 'the config'}: {one_line(error)}"
    return str(error)


@contextmanager
def exit_in_one_line(debug: bool = False) -> Iterator[None]:
    """Around a command: what a user can mend ends it with one line and exit status 1.

    Args:
        debug (bool): let the exception through, for its traceback.
    """
    try:
        yield
    except MENDABLE as error:
        if debug:
            raise
        sys.exit(f"error: {in_user_terms(error)}")
