"""A user's error is one line that says what to change. A bug keeps its traceback."""

import logging
import os
import re
import sys
from contextlib import contextmanager
from traceback import walk_tb
from typing import ContextManager, Iterator, List, Tuple, Type, Union

from omegaconf.errors import OmegaConfBaseException

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
LOGGERS = ("detectron2", "ssimkd")
TRAIN_KEYS = ("INHERIT", "CHECK_IMAGES", "SKIP_NONFINITE_STEPS", "WANDB_PROJECT")
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


# Where keys of MODEL.DISTILL are in a LazyConfig, if not in model.distiller. `register_loss` adds
# the nodes of the losses.
LAZY_FIELDS = {
    **{f"MODEL.DISTILL.{key}": f"train.{key.lower()}" for key in TRAIN_KEYS},
    **{key: f"train.{key.lower()}" for key in TRAIN_KEYS},
    "MODEL.DISTILL.LOG_GRADIENTS": "model.log_gradients",
    "MODEL.DISTILL.TEACHER.LOSS_WEIGHT": "model.distiller.loss_weight",
    "MODEL.DISTILL.TEACHERS": "model.distiller",
    "DATASETS.COCO": "datasets.coco",
    "DATASETS.UNLABELED": "dataloader.unlabeled",
    "DATASETS.NUM_CLASSES_FROM_DATA": "datasets.num_classes_from_data",
    "DATALOADER.SKIP_BAD_IMAGES": "dataloader.train.skip_bad_images",
    "MODEL.BACKBONE.FREEZE_AT": "model.backbone.bottom_up.freeze_at",
    **{
        f"MODEL.{library}.{key}": f"model.backbone.bottom_up.{key.lower()}"
        for library in ("TORCHVISION", "TIMM")
        for key in ("NAME", "NORM", "WEIGHTS")
    },
}
YAML_KEY = re.compile(
    r"\b(MODEL\.(?:DISTILL|TORCHVISION|TIMM)|DATASETS|DATALOADER)(\.[A-Z_0-9]+)+\b"
    r"|\bMODEL\.BACKBONE\.FREEZE_AT\b"
    r"|(?<![\w./\\-])(\.OPTS|\.CONFIG|\.TEACHERS|TEACHER\.\w+|IN_FEATURES"  # not parts of paths
    r"|LEVEL_WEIGHTS|ADAPTER|LOSSES|(?:WARMUP|COOLDOWN)_ITERS|STOP_ITER|"
    + "|".join(TRAIN_KEYS)
    + r")\b(?![/\\])"
)


def lazy_fields(text: str) -> str:
    """A text in which every key of MODEL.DISTILL is replaced by the LazyConfig's field."""

    def field(match: "re.Match[str]") -> str:
        key = match.group()
        if text[match.end() :].startswith(" (.yaml)"):  # the field follows
            return key
        if key in LAZY_FIELDS:
            return LAZY_FIELDS[key]
        parts = key.split(".")
        if len(parts) == 4 and parts[2] != "TEACHER":  # MODEL.DISTILL.<LOSS>.<OPTION>
            return f"model.distiller.losses, {parts[2].lower()}: {parts[3].lower()}"
        return key.replace("MODEL.DISTILL", "model.distiller").lower()

    return YAML_KEY.sub(field, text)


def name_lazy_fields(record: logging.LogRecord) -> bool:
    """A filter for log handlers: warnings name fields of a LazyConfig; every record passes."""
    if record.levelno >= logging.WARNING:
        record.msg, record.args = lazy_fields(record.getMessage()), ()
    return True


@contextmanager
def naming_lazy_fields(lazy: bool = True) -> Iterator[None]:
    """If `lazy`, errors and warnings in this block name fields of a LazyConfig, not YAML's keys."""
    loggers = (logging.getLogger("ssimkd"), logging.getLogger()) if lazy else ()
    handlers = [handler for logger in loggers for handler in logger.handlers]
    handlers = [handler for handler in handlers if name_lazy_fields not in handler.filters]
    for handler in handlers:
        handler.addFilter(name_lazy_fields)
    try:
        yield
    except ConfigError as error:
        if not lazy or lazy_fields(str(error)) == str(error):
            raise
        raise ConfigError(lazy_fields(str(error))) from error
    finally:
        for handler in handlers:
            handler.removeFilter(name_lazy_fields)


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


def log_traceback(error: BaseException) -> List[str]:
    """Writes an error's traceback to the log files, not to the terminal; returns their paths."""
    record = logging.LogRecord(
        *("ssimkd", logging.ERROR, __file__, 0, "The run ends with an error:", None),
        exc_info=(type(error), error, error.__traceback__),
    )
    paths: List[str] = []
    for name in LOGGERS:
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
