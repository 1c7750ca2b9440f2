"""What the settings of a run may be, checked before anything is built or written."""

import math
import os
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from .distiller import Distiller
from .distillers import Distillers, build_distiller
from .errors import ConfigError, one_line

# Key -> its least value; an integer where that is one. A config need not have all.
YAML = {
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.BASE_LR": 0.0,
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MAX_SIZE_TEST": 1,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.RETINANET.NUM_CLASSES": 1,
}
LAZY = {
    "dataloader.train.total_batch_size": 1,
    "dataloader.train.num_workers": 0,
    "dataloader.test.num_workers": 0,
    "train.max_iter": 1,
    "train.checkpointer.period": 1,
    "train.log_period": 1,
    "optimizer.lr": 0.0,
    "model.num_classes": 1,
    "model.roi_heads.num_classes": 1,
}


def value_of(cfg: Any, key: str) -> Any:
    """The value of a dotted key in a CfgNode or DictConfig; None where there is none."""
    if not isinstance(cfg, CfgNode):
        return OmegaConf.select(cfg, key)
    for part in key.split("."):
        cfg = cfg.get(part) if isinstance(cfg, CfgNode) else None
    return cfg


def check_limits(cfg: Any, eval_only: bool) -> None:
    """Raises ConfigError, naming the key, for settings that cannot work, whatever the machine."""
    lazy = not isinstance(cfg, CfgNode)
    for key, least in (LAZY if lazy else YAML).items():
        check_number(key, value_of(cfg, key), least)
    folder, device = (
        ("train.output_dir", "train.device") if lazy else ("OUTPUT_DIR", "MODEL.DEVICE")
    )
    check_folder(folder, value_of(cfg, folder))
    weights = "train.init_checkpoint" if lazy else "MODEL.WEIGHTS"
    if not isinstance(value_of(cfg, weights), str):
        raise ConfigError(f"{weights} must name a checkpoint, or be empty")
    try:
        torch.device(str(value_of(cfg, device)))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{device}: {one_line(error)}") from error
    if not eval_only:
        (check_lazy if lazy else check_yaml)(cfg)


def check_number(key: str, value: Any, least: float) -> None:
    """Raises ConfigError unless a value, if there is one, is finite and large enough."""
    if value is None or isinstance(value, DictConfig):
        return
    kinds = (int, float) if isinstance(least, float) else (int,)
    if type(value) not in kinds or not least <= value < math.inf:
        kind = "a finite number" if isinstance(least, float) else "an integer"
        raise ConfigError(f"{key} must be {kind} of at least {least}, got {value!r}")


def check_folder(key: str, folder: Any) -> None:
    """Raises ConfigError unless the folder of the results can be made and written."""
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"{key} must name the folder of the results, got {folder!r}")
    if "://" in folder:
        raise ConfigError(f"{key}: {folder} is no folder of this machine")
    there = os.path.abspath(folder)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {folder} cannot be written: {there} is no folder, or read-only")


def check_yaml(cfg: CfgNode) -> None:
    """What only a `.yaml` config holds, of the training."""
    if not cfg.INPUT.MIN_SIZE_TRAIN:
        raise ConfigError("INPUT.MIN_SIZE_TRAIN is empty: name at least one size in pixels")
    formats = ("BGR", "YUV-BT.601", *Image.MODES)
    if cfg.INPUT.FORMAT not in formats:
        raise ConfigError(f"INPUT.FORMAT: {cfg.INPUT.FORMAT!r} is none of {', '.join(formats)}")
    if cfg.MODEL.DISTILL.LOSSES:
        build_distiller(cfg)


def check_lazy(cfg: DictConfig) -> None:
    """What only a `.py` config holds, of the training."""
    for key in ("model", "optimizer", "lr_multiplier", "dataloader.train", "dataloader.test"):
        if not isinstance(value_of(cfg, key), DictConfig):
            raise ConfigError(f"{key} must be a node that is called, got {value_of(cfg, key)!r}")
    distiller = cfg.model.get("distiller")
    if distiller is not None:
        try:
            built = instantiate(distiller)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"model.distiller: {one_line(error)}") from error
        if not isinstance(built, (Distiller, Distillers)):
            raise ConfigError(f"model.distiller must be a Distiller or Distillers, got {built!r}")
