"""The one exception for input that a user can mend."""

import re
import sys
from contextlib import contextmanager
from typing import Iterator

from omegaconf.errors import OmegaConfBaseException

WORKER = r"^ssimkd\.\w+\.\w+: "  # how a traceback names an exception of this package


class ConfigError(ValueError):
    """Wrong settings, files or data: one line that names the key, file or level to change."""

    def __init__(self, text: str = "") -> None:
        lines = text.strip().splitlines()
        if text.startswith("Caught "):  # torch's, from a data worker: its traceback, then the line
            lines = [re.sub(WORKER, "", lines[-1])]
        super().__init__(" ".join(lines))


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


@contextmanager
def exit_in_one_line(debug: bool = False) -> Iterator[None]:
    """Around a command: what a user can mend ends it with one line and exit status 1.

    That is a ConfigError, OmegaConf's own, or a FloatingPointError: losses that are not finite.

    Args:
        debug (bool): let the exception through, for its traceback.
    """
    try:
        yield
    except OmegaConfBaseException as error:
        if debug:
            raise
        sys.exit(f"error: {error.full_key or 'the config'}: {one_line(error)}")
    except (ConfigError, FloatingPointError) as error:
        if debug:
            raise
        sys.exit(f"error: {error}")
