"""Names the fields of a LazyConfig in errors and warnings, whose texts have YAML's keys."""

import logging
import re
from contextlib import contextmanager
from typing import Iterator

from ssimkd.errors import ConfigError

TRAIN_KEYS = ("INHERIT", "CHECK_IMAGES", "SKIP_NONFINITE_STEPS", "WANDB_PROJECT")
# Where this project's keys are in a LazyConfig, if not in model.distiller. `register_loss` adds
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
    """A text in which each of this project's keys is replaced by the LazyConfig's field."""

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
