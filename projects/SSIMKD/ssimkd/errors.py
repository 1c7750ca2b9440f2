"""The one exception for input that a user can mend."""

import logging
import re
import sys
from contextlib import contextmanager
from typing import ContextManager, Iterator, Tuple, Type, Union

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


# The folder of a run, as errors name it.
OUTPUT = "OUTPUT_DIR (.yaml) or train.output_dir (.py)"
# What a user can mend: a FloatingPointError says which loss or map is not finite.
USER_ERRORS = (ConfigError, FloatingPointError, OmegaConfBaseException)


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def describe_error(error: BaseException) -> str:
    """One of USER_ERRORS as one line that names what to change."""
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key or 'the config'}: {one_line(error)}"
    return str(error)


@contextmanager
def as_config_error(
    what: str,
    failures: Union[Type[Exception], Tuple[Type[Exception], ...]] = ConfigError,
    sep: str = ": ",
) -> Iterator[None]:
    """Around what may fail: the failure is a ConfigError that says what failed.

    Args:
        what (str): the key to change, and what cannot be done; "" leaves the failure as it is.
        failures (type or tuple): of a ConfigError its text follows, of others :func:`one_line`.
        sep (str): between the two.
    """
    try:
        yield
    except failures as error:
        if not what:
            raise
        text = str(error) if isinstance(error, ConfigError) else one_line(error)
        raise ConfigError(f"{what}{sep}{text}") from error


def as_output_error(what: str) -> ContextManager[None]:
    """Around a change of a run's folder, in words: that it cannot be made is a ConfigError."""
    return as_config_error(f"{OUTPUT}: cannot {what}", OSError)


@contextmanager
def wrong_input() -> Iterator[None]:
    """Around what knows no configs, such as a loss: its ValueError is a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def building(what: str) -> Iterator[None]:
    """Around a part of a run that settings describe: its failure is a ConfigError that names them.

    Detectron2 raises anything there: KeyError for an unknown name, AssertionError for a number.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {one_line(error)}") from error


@contextmanager
def exit_in_one_line(debug: bool = False) -> Iterator[None]:
    """Around a command: what a user can mend ends it with one line and exit status 1.

    Args:
        debug (bool): let the exception through, for its traceback.
    """
    try:
        yield
    except USER_ERRORS as error:
        if debug:
            raise
        sys.exit(f"error: {describe_error(error)}")


@contextmanager
def traceback_in_log_only(debug: bool = False) -> Iterator[None]:
    """Around a training: Detectron2's traceback of what a user can mend goes to log.txt alone.

    Args:
        debug (bool): let it reach the terminal, too.
    """
    # by a filter of its logger: a progress bar puts another handler into the terminal's place
    logger = logging.getLogger("detectron2.engine.train_loop")
    if not debug:
        logger.addFilter(_off_terminal)
    try:
        yield
    finally:
        logger.removeFilter(_off_terminal)


def _off_terminal(record: logging.LogRecord) -> bool:
    if not (record.exc_info and isinstance(record.exc_info[1], USER_ERRORS)):
        return True
    for handler in logging.getLogger("detectron2").handlers:
        if getattr(handler, "stream", None) not in (sys.stdout, sys.stderr):
            handler.handle(record)
    return False
