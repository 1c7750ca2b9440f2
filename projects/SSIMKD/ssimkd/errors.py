"""An error of the user's is one line that says what to change; a bug keeps its traceback."""

import logging
import re
import sys
from contextlib import contextmanager
from traceback import walk_tb
from typing import ContextManager, Iterator, List, Tuple, Type, Union

from omegaconf.errors import OmegaConfBaseException

# How the last line of a traceback from another process names a user's error.
WORKER = re.compile(r"^(ssimkd\.\w+(\.\w+)*|FloatingPointError): ")
# Who raises an error for a wrong setting; behind any other module is the user's own code.
LIBRARIES = {
    *("detectron2", "fvcore", "iopath", "yacs", "omegaconf", "hydra", "torch", "torchvision"),
    *("numpy", "PIL", "yaml", "antlr4", "pycocotools", __name__.split(".")[0]),
    *getattr(sys, "stdlib_module_names", ("ast", "collections", "copy", "functools", "importlib")),
}
LOGGERS = ("detectron2", "ssimkd")
IN_LOG = " (traceback in "  # then the file


class ConfigError(ValueError):
    """Wrong settings, files or data: one line that names the key, file or level to change."""

    def __init__(self, text: str = "") -> None:
        lines = text.strip().splitlines()
        if text.startswith("Caught "):  # torch's, from a data worker: its traceback, then the line
            lines = [WORKER.sub("", lines[-1])]
        super().__init__(" ".join(lines))


# The folder of a run, as errors name it.
OUTPUT = "OUTPUT_DIR (.yaml) or train.output_dir (.py)"


def is_user_error(error: BaseException) -> bool:
    """Whether an error says in one line what the user can change.

    A FloatingPointError says which loss or gradient is not finite; an OSError may name a file.
    """
    if isinstance(error, OSError):
        return error.filename is not None
    return isinstance(error, (ConfigError, FloatingPointError, OmegaConfBaseException))


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def describe_error(error: BaseException) -> str:
    """An error of the user's as one line that names what to change."""
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key or 'the config'}: {one_line(error)}"
    return one_line(error) if isinstance(error, OSError) else str(error)


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
def as_setting_error(key: str) -> Iterator[None]:
    """Around what Detectron2 builds from settings: its failure is a ConfigError that names the key.

    Detectron2 raises anything for a wrong setting, such as KeyError for an unknown name. The
    traceback goes to log.txt. A failure of the user's own code, such as a backbone, or of this
    package goes on as it is.

    Args:
        key (str): of the settings, such as "SOLVER".
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if not blames_settings(error):
            raise
        files = log_traceback(error)
        where = f"{IN_LOG}{files[0]})" if files else ""
        raise ConfigError(f"{key}: {one_line(error)}{where}") from error


def blames_settings(error: BaseException) -> bool:
    """Whether an error comes from a library, and no code of the user's is on the way to it.

    This package raises a ValueError where an option is wrong; anything else is a bug of its own.

    Args:
        error (BaseException): as the context manager above catches it.
    """
    own = __name__.split(".")[0]
    modules = (
        [own]
        + [
            str(frame.f_globals.get("__name__", own)).split(".")[0]  # a .py config has no name
            for frame, _ in list(walk_tb(error.__traceback__))[2:]  # behind "yield" and the block
        ]
    )
    if not LIBRARIES.issuperset(modules):
        return False
    return modules[-1] != own or isinstance(error, ValueError)


def log_traceback(error: BaseException) -> List[str]:
    """Writes an error's traceback to the log files of a run alone; returns their paths."""
    record = logging.LogRecord(
        *("ssimkd", logging.ERROR, __file__, 0, "The run ends with an error:", None),
        exc_info=(type(error), error, error.__traceback__),
    )
    paths: List[str] = []
    for name in LOGGERS:
        for handler in log_files(name):
            if handler.stream.name not in paths:  # one file may have several loggers
                handler.handle(record)
                paths.append(handler.stream.name)
    return paths


def log_files(name: str) -> Iterator[logging.StreamHandler]:
    """A logger's handlers that write to files."""
    for handler in logging.getLogger(name).handlers:
        stream = getattr(handler, "stream", None)
        if stream not in (None, sys.stdout, sys.stderr) and isinstance(
            getattr(stream, "name", None), str
        ):
            yield handler  # type: ignore[misc]


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Around a command: an error of the user's ends it with one line and exit status 1."""
    try:
        yield
    except Exception as error:
        if not is_user_error(error):
            raise
        sys.exit(f"error: {describe_error(error)}")


@contextmanager
def traceback_in_log() -> Iterator[None]:
    """Around a run: the traceback of its error is in log.txt, once.

    Detectron2 logs the errors of its training loop; those of the user's do not reach the terminal.
    """
    logged: List[BaseException] = []

    def keep_off_terminal(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return True
        logged.append(error)
        if is_user_error(error):
            for handler in log_files("detectron2"):
                handler.handle(record)
        return not is_user_error(error)

    # by a filter of its logger: a progress bar puts another handler into the terminal's place
    logger = logging.getLogger("detectron2.engine.train_loop")
    logger.addFilter(keep_off_terminal)
    try:
        yield
    except Exception as error:
        if error not in logged and IN_LOG not in str(error):
            log_traceback(error)
        raise
    finally:
        logger.removeFilter(keep_off_terminal)
