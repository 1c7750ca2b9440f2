"""The one exception for input that a user can mend."""

import sys
from contextlib import contextmanager
from typing import Iterator


class ConfigError(ValueError):
    """Wrong settings, files or data: one line that names the key, file or level to change."""


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Around a command: a ConfigError or NaN ends it with its one line and exit status 1."""
    try:
        yield
    except (ConfigError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
