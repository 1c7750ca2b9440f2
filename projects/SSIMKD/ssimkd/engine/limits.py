"""What the settings of a run may be, checked before anything is built or written."""

import math
import os
import sys
from typing import Any, Dict, Sequence

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetMapper
from omegaconf import DictConfig, ListConfig

from ssimkd.errors import ConfigError, as_config_error, building
from ssimkd.modeling.distiller import Distiller
from ssimkd.modeling.several_teachers import Distillers, build_distiller
from ssimkd.utils.config_keys import key_of, setting, value_of

from .image_format import check_format

MOST = sys.float_info.max
FINE = 1e-6  # what a number above 0 is at least
# Key -> its least value, or least and greatest; integers where the least is one, or a truth value.
# Of a list each number counts, and there has to be one. A config need not have all.
YAML: Dict[str, Any] = {
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "SOLVER.BASE_LR": 0.0,
    "SOLVER.MOMENTUM": 0.0,
    "SOLVER.WEIGHT_DECAY": 0.0,
    "SOLVER.GAMMA": 0.0,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.WARMUP_FACTOR": 0.0,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.0,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (FINE, math.inf),
    "SEED": (-(2**31), 2**31 - 1),  # NumPy's end at 2**32; each process adds its rank
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": 1,
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MIN_SIZE_TEST": 0,  # 0: as they are
    "INPUT.MAX_SIZE_TEST": 1,
    "TEST.DETECTIONS_PER_IMAGE": -1,  # -1: all
    "TEST.EVAL_PERIOD": 0,
    "MODEL.PIXEL_MEAN": -MOST,
    "MODEL.PIXEL_STD": FINE,
    "MODEL.FPN.OUT_CHANNELS": 1,
    "MODEL.ANCHOR_GENERATOR.SIZES": FINE,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": FINE,
    "MODEL.RPN.NMS_THRESH": 0.0,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 1,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 1,
    "MODEL.RPN.POSITIVE_FRACTION": (0.0, 1.0),
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": (0.0, 1.0),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 1,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 1,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 1,
    "MODEL.RETINANET.NUM_CLASSES": 1,
}
LAZY: Dict[str, Any] = {
    "dataloader.train.total_batch_size": 1,
    "dataloader.train.num_workers": 0,
    "dataloader.train.skip_bad_images": False,
    "dataloader.test.num_workers": 0,
    "train.seed": YAML["SEED"],
    "train.max_iter": 1,
    "train.eval_period": 0,
    "train.checkpointer.period": 1,
    "train.checkpointer.max_to_keep": 1,
    "train.log_period": 1,
    "optimizer.lr": 0.0,
    "optimizer.momentum": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.params.weight_decay_norm": 0.0,
    "model.num_classes": 1,
    "model.roi_heads.num_classes": 1,
}
NULL = ("train.checkpointer.max_to_keep", "optimizer.params.weight_decay_norm")  # may be null
NODES = (
    *("model", "optimizer", "optimizer.params", "lr_multiplier"),
    *("dataloader.train", "dataloader.test", "train.checkpointer", "train.ddp"),
)
LISTS = (list, tuple, ListConfig)
MAPPERS = (DatasetMapper, "detectron2.data.dataset_mapper.DatasetMapper")  # a saved config has text
ABSENT = object()


def check_limits(cfg: Any, eval_only: bool) -> None:
    """Raises ConfigError, naming the key, for settings that cannot work, whatever the machine."""
    lazy = not isinstance(cfg, CfgNode)
    for key, limits in (LAZY if lazy else YAML).items():
        value = value_of(cfg, key, ABSENT)
        if value is not ABSENT and not (value is None and key in NULL):
            check_value(key, value, *(limits if isinstance(limits, tuple) else (limits,)))
    check_folder(key_of(cfg, "output"), setting(cfg, "output"))
    if not isinstance(setting(cfg, "weights"), str):
        raise ConfigError(f"{key_of(cfg, 'weights')} must name a checkpoint, or be empty")
    with as_config_error(key_of(cfg, "device"), (RuntimeError, ValueError)):
        torch.device(str(setting(cfg, "device")))
    check_formats(cfg, ("test",) if eval_only else ("train", "test"))
    if not lazy:
        check_expected(cfg.TEST.EXPECTED_RESULTS)
    if not eval_only:
        (check_lazy if lazy else check_yaml)(cfg)


def check_value(key: str, value: Any, least: float, most: float = MOST) -> None:
    """Raises ConfigError unless a value, or each of a list, lies in its limits.

    A node of a LazyConfig that is called is left alone.
    """
    if isinstance(value, LISTS):
        if not value:
            raise ConfigError(f"{key} is empty, or has a part that is: name at least one number")
        for item in value:
            check_value(key, item, least, most)
        return
    if isinstance(value, DictConfig):
        return
    kinds = (int, float) if isinstance(least, float) else (type(least),)
    if type(value) not in kinds or not least <= value <= most:
        number = "a finite number" if isinstance(least, float) else "an integer"
        upper = "" if most in (MOST, math.inf) else f" and at most {most}"
        kind = "True or False" if least is False else f"{number} of at least {least}{upper}"
        raise ConfigError(f"{key} must be {kind}, got {value!r}")


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


def check_formats(cfg: Any, splits: Sequence[str]) -> None:
    """Raises ConfigError unless a detector can take images in the format that they are read in.

    Args:
        cfg (CfgNode or DictConfig): of its mappers only Detectron2's are looked at.
        splits (sequence[str]): "train", "test".
    """
    if isinstance(cfg, CfgNode):
        keys, names = ["INPUT.FORMAT"], ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
    else:
        mappers = [f"dataloader.{split}.mapper" for split in splits]
        keys = [f"{key}.image_format" for key in mappers if is_detectron2s(value_of(cfg, key))]
        names = ("model.pixel_mean", "model.pixel_std")
    pixels = {key: value_of(cfg, key) for key in names}
    pixels = {key: values for key, values in pixels.items() if isinstance(values, LISTS)}
    for key in keys:
        check_format(key, value_of(cfg, key), pixels)


def is_detectron2s(mapper: Any) -> bool:
    """Whether a node of a LazyConfig is Detectron2's mapper: others may read what they like."""
    return isinstance(mapper, DictConfig) and mapper.get("_target_") in MAPPERS


def check_yaml(cfg: CfgNode) -> None:
    """What only a `.yaml` config holds, of the training."""
    if cfg.SOLVER.IMS_PER_BATCH % (cfg.SOLVER.REFERENCE_WORLD_SIZE or 1):
        raise ConfigError(
            "SOLVER.IMS_PER_BATCH must be a multiple of SOLVER.REFERENCE_WORLD_SIZE, "
            f"{cfg.SOLVER.REFERENCE_WORLD_SIZE}: it is scaled to the number of processes"
        )
    check_no_none(cfg.MODEL.DISTILL, "MODEL.DISTILL")
    if cfg.MODEL.DISTILL.LOSSES:
        with building("MODEL.DISTILL"):  # a value may be of a kind that nothing expects
            build_distiller(cfg)


def check_no_none(node: CfgNode, name: str) -> None:
    """Raises ConfigError for a key set to None, which yacs takes in place of any value."""
    for key, value in node.items():
        if value is None:
            raise ConfigError(f"{name}.{key} is None: give it a value, or leave it out")
        if isinstance(value, CfgNode):
            check_no_none(value, f"{name}.{key}")


def check_expected(results: Sequence[Any]) -> None:
    """Raises ConfigError unless Detectron2 can compare an evaluation with TEST.EXPECTED_RESULTS."""
    for entry in results:
        kinds = [type(x) for x in entry] if isinstance(entry, (list, tuple)) else []
        if kinds[:2] != [str, str] or len(kinds) != 4 or not set(kinds[2:]) <= {int, float}:
            raise ConfigError(
                "TEST.EXPECTED_RESULTS: an entry is [task, metric, value, tolerance] such as "
                f"['bbox', 'AP', 38.5, 0.2], got {entry!r}"
            )


def check_lazy(cfg: DictConfig) -> None:
    """What only a `.py` config holds, of the training: its nodes and its distiller."""
    for key in NODES:
        if not isinstance(value_of(cfg, key), DictConfig):
            raise ConfigError(f"{key} must be a node, got {value_of(cfg, key)!r}")
    distiller = cfg.model.get("distiller")
    if distiller is not None:
        with building("model.distiller"):
            built = instantiate(distiller)
        if not isinstance(built, (Distiller, Distillers)):
            raise ConfigError(f"model.distiller must be a Distiller or Distillers, got {built!r}")
