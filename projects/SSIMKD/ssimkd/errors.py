"""A user's error is one line that says what to change. A bug keeps its traceback."""

import logging
import re
import sys
from contextlib import contextmanager
from traceback import walk_tb
from typing import ContextManager, Iterator, List, Tuple, Type, Union

from omegaconf.errors import OmegaConfBaseException

from ssimkd.utils.log_files import log_files, log_traceback

# A traceback from another process ends with such a line where the error is a user's.
WORKER = re.compile(r"^(ssimkd\.\w+(\.\w+)*|FloatingPointError): ")
# These packages raise errors for wrong settings. Any other module is the user's own code.
LIBRARIES = {
    *("detectron2", "fvcore", "iopath", "yacs", "omegaconf", "hydra", "torch", "torchvision"),
    *("numpy", "PIL", "yaml", "antlr4", "pycocotools", __name__.split(".")[0]),
    *getattr(sys, "stdlib_module_names", ("ast", "collections", "copy", "functools", "importlib")),
}
# fvcore's registries, and Detectron2's LazyConfig, say this of what no import has defined.
UNKNOWN = re.compile(
    "No object named .* registry|Cannot dynamically locate|Error (loading|locating) "
)
IN_LOG = " (traceback in "  # the path of the log file follows


class ConfigError(ValueError):
    """Settings, files or data are wrong. One line names the key, file or level to change."""

    def __init__(self, text: str = "") -> None:
        lines = text.strip().splitlines()
        if text.startswith("Caught "):  # torch adds the traceback of a data worker before the error
            lines = [WORKER.sub("", lines[-1])]
        super().__init__(" ".join(lines))


# The folder of a run, as errors name it.
OUTPUT = "OUTPUT_DIR (.yaml) or train.output_dir (.py)"


def is_user_error(error: BaseException) -> bool:
    """Whether an error says in one line what the user can change.

    A FloatingPointError names the loss or gradient that is not finite. An OSError may name a file.
    """
    if isinstance(error, OSError):
        return error.filename is not None
    return isinstance(error, (ConfigError, FloatingPointError, OmegaConfBaseException))


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    text = str(error).strip().splitlines()
    hint = "; --import names the module that holds it" if UNKNOWN.search(str(error)) else ""
    return f"{type(error).__name__}: {text[0]}{hint}" if text else type(error).__name__


def shortened(error: Exception) -> str:
    """The beginning of an exception's long message, on one line."""
    return " ".join(str(error).split())[:200]


def describe_error(error: BaseException) -> str:
    """A user's error as one line that names what to change."""
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key or 'the config'}: {one_line(error)}"
    return one_line(error) if isinstance(error, OSError) else str(error)


@contextmanager
def as_config_error(
    what: str,
    failures: Union[Type[Exception], Tuple[Type[Exception], ...]] = ConfigError,
    sep: str = ": ",
) -> Iterator[None]:
    """Turns an exception of its block into a ConfigError that begins with `what`.

    Args:
        what (str): the key to change, and what cannot be done. "" leaves the exception as it is.
        failures (type or tuple): the exceptions that are turned.
        sep (str): stands between `what` and the text of the exception.
    """
    try:
        yield
    except failures as error:
        if not what:
            raise
        text = str(error) if isinstance(error, ConfigError) else one_line(error)
        raise ConfigError(f"{what}{sep}{text}") from error


def as_output_error(what: str) -> ContextManager[None]:
    """Turns an OSError of its block into a ConfigError that reads "OUTPUT_DIR: cannot `what`"."""
    return as_config_error(f"{OUTPUT}: cannot {what}", OSError)


@contextmanager
def as_setting_error(key: str) -> Iterator[None]:
    """Turns what Detectron2 raises for a wrong setting into a ConfigError that names the key.

    Detectron2 raises many types, such as KeyError for an unknown name. The traceback goes to
    log.txt. A bug in the user's own code, such as a backbone, or in this package stays as it is.

    Args:
        key (str): the settings from which the block builds something, such as "SOLVER".
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
    """Whether a wrong setting caused an error that :func:`as_setting_error` has caught.

    The error comes from a library, and the user's own code was not called on the way to it. This
    package itself raises a ValueError for a wrong option. Any other error of its own is a bug.
    """
    own = __name__.split(".")[0]
    frames = list(walk_tb(error.__traceback__))[2:]  # without "yield" and the block itself
    names = [str(frame.f_globals.get("__name__", own)) for frame, _ in frames]  # a config has none
    modules = [own, *(name.split(".")[0] for name in names)]
    if not LIBRARIES.issuperset(modules):
        return False
    return modules[-1] != own or isinstance(error, ValueError)


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Ends the command with one line and exit status 1 where its block raises a user's error."""
    try:
        yield
    except Exception as error:
        if not is_user_error(error):
            raise
        sys.exit(f"error: {describe_error(error)}")


@contextmanager
def traceback_in_log() -> Iterator[None]:
    """Writes the traceback of an error of its block to log.txt, once.

    Detectron2 logs an error of the training loop by itself. The traceback of a user's error is kept
    off the terminal.
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
