"""A student for a training loop of the user's own: `ssimkd.build_student`."""

import copy
import logging
from dataclasses import replace
from typing import Any

from detectron2.config import CfgNode

from ssimkd.checkpoint.run_checkpointer import RunCheckpointer
from ssimkd.config import check_has_keys
from ssimkd.data.datasets import check_classes
from ssimkd.errors import ConfigError
from ssimkd.modeling.meta_arch import DistillMixin
from ssimkd.utils.config_keys import datasets_of, key_of, setting, unlabeled_batch
from ssimkd.utils.lazy_fields import naming_lazy_fields

from .arguments import SPLITS, with_own_data
from .driver import driver_of
from .preflight import prepare
from .settings import read_settings

logger = logging.getLogger(__name__)


def build_student(cfg: Any) -> Any:
    """The student of a config, ready for the first step of a training loop of your own.

    It takes the place of `build_model(cfg)` or `instantiate(cfg.model)`, and does what `ssimkd
    train` does before its first step, except the check on training images: it registers the data
    of DATASETS.COCO, takes the number of classes from the data where the config says so, loads
    MODEL.WEIGHTS, builds the teachers, and lets the student inherit from them. Do not load
    MODEL.WEIGHTS again. To continue a training, load its checkpoint into the student.

    Args:
        cfg (CfgNode or DictConfig): with the keys of `add_ssimkd_config`, or with the fields of
            `lazy_driver.py`. It stays as it is.

    Returns:
        nn.Module: in training mode, on the config's device.

    Raises:
        ConfigError: as before a training, or SKIP_NONFINITE_STEPS is set, which only the training
            loop of `ssimkd train` can act on.
    """
    with naming_lazy_fields(not isinstance(cfg, CfgNode)):
        return _build_student(copy.deepcopy(cfg))


def _build_student(cfg: Any) -> Any:
    yaml = isinstance(cfg, CfgNode)
    if yaml:
        check_has_keys(cfg)
    settings = read_settings(cfg)
    if settings.skip_nonfinite_steps:
        raise ConfigError(
            "MODEL.DISTILL.SKIP_NONFINITE_STEPS: only the training loop of `ssimkd train` leaves "
            "out steps: set it to 0"
        )
    own = {
        key_of(cfg, "UNLABELED"): unlabeled_batch(cfg),
        "DATALOADER.MAPPER": yaml and cfg.DATALOADER.MAPPER,
        "DATALOADER.SKIP_BAD_IMAGES": yaml and cfg.DATALOADER.SKIP_BAD_IMAGES,
        "MODEL.DISTILL.WANDB_PROJECT": settings.wandb_project,
    }
    ignored = [key for key, value in own.items() if value]
    if ignored:
        logger.warning("%s: your own loader and loop have to act on it", " and ".join(ignored))
    if yaml:
        cfg.defrost()
    cfg = with_own_data(cfg, SPLITS)
    weights = str(setting(cfg, "weights") or "")
    model = driver_of(cfg).build_with_teachers(cfg)
    check_classes(model, datasets_of(cfg, "TRAIN", "TEST"))
    checkpointer = RunCheckpointer(model, setting(cfg, "output"), key=key_of(cfg, "weights"))
    checkpointer.resume_or_load(weights, resume=False)
    prepare(model, None, replace(settings, check_images=0), resumed=False)
    if isinstance(model, DistillMixin):
        model.driver_keys = []  # it is done, also for a pickled student, which has no teacher
    return model.train()
