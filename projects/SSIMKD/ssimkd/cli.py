"""From a command line to a config that can run."""

import os
from typing import List, Tuple

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import OmegaConf

from .config import add_ssimkd_config
from .data import check_datasets, classes_of, register_coco
from .errors import ConfigError, one_line


def load_config(path: str, overrides: List[str]):
    """The config of a file: a CfgNode (`.yaml`) or a DictConfig (`.py`).

    Args:
        path (str): the file.
        overrides (list[str]): "KEY", "value", ... for `.yaml`; "key=value", ... for `.py`.

    Raises:
        ConfigError: it cannot be read, or an override does not apply.
    """
    if not path:
        raise ConfigError(
            "--config-file is missing, for example --config-file configs/ssimkd_R50.yaml"
        )
    try:
        if path.endswith(".py"):
            cfg = LazyConfig.apply_overrides(LazyConfig.load(path), overrides)
        else:
            cfg = get_cfg()
            add_ssimkd_config(cfg)
            cfg.merge_from_file(path)
            cfg.merge_from_list(overrides)
    except Exception as error:
        extra = f" with {' '.join(overrides)}" if overrides else ""
        raise ConfigError(f"{path}{extra}: {one_line(error)}") from error
    if isinstance(cfg, CfgNode):
        use_own_data(cfg)
        cfg.freeze()
    else:
        lazy_use_own_data(cfg)
    return cfg


def use_own_data(cfg: CfgNode) -> None:
    """Registers `DATASETS.COCO` and, where asked, takes the number of classes from the data.

    Raises:
        ConfigError: a file is missing or is not in COCO's format.
    """
    register_coco(cfg.DATASETS.COCO)
    if cfg.DATASETS.NUM_CLASSES_FROM_DATA:
        classes = classes_of(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
        for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET, cfg.MODEL.DISTILL.ICD):
            node.NUM_CLASSES = classes


def lazy_use_own_data(cfg) -> None:
    """As :func:`use_own_data` for the optional node `datasets` of a LazyConfig."""
    node = cfg.get("datasets", {})
    register_coco([{k.upper(): v for k, v in entry.items()} for entry in node.get("coco", [])])
    if node.get("num_classes_from_data"):
        head = cfg.model.roi_heads if "roi_heads" in cfg.model else cfg.model
        head.num_classes = classes_of(*lazy_data(cfg, "train"))


def lazy_data(cfg, split: str) -> Tuple[List[str], str]:
    """Names of the data sets of a LazyConfig's split ("train" or "test"), and their key."""
    key = f"dataloader.{split}.dataset.names"
    names = OmegaConf.select(cfg, key) or []
    return [names] if isinstance(names, str) else list(names), key


def check_config(cfg, *, eval_only: bool, resume: bool, num_gpus: int) -> None:
    """Raises ConfigError for what would fail later and less clearly: missing files and devices."""
    if isinstance(cfg, CfgNode):
        used = {"DATASETS.TEST": cfg.DATASETS.TEST, "DATASETS.TRAIN": cfg.DATASETS.TRAIN}
        device, use_cpu = cfg.MODEL.DEVICE, "MODEL.DEVICE cpu"
        amp, amp_key = cfg.SOLVER.AMP.ENABLED, "SOLVER.AMP.ENABLED"
        weights, weights_key = cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS"
    else:
        used = {key: names for names, key in (lazy_data(cfg, s) for s in ("test", "train"))}
        device, use_cpu = cfg.train.device, "train.device=cpu"
        amp, amp_key = cfg.train.amp.enabled, "train.amp.enabled"
        weights, weights_key = cfg.train.init_checkpoint, "train.init_checkpoint"
    for key, names in list(used.items())[: 1 if eval_only else 2]:
        check_datasets(names, key)
    if (
        weights
        and "://" not in weights
        and not resume
        and not os.path.isfile(weights.split("?")[0])
    ):
        raise ConfigError(f"{weights_key}: there is no file {weights}")
    if num_gpus > 1 and not device.startswith("cuda"):
        raise ConfigError(
            f"--num-gpus is {num_gpus} and the device is {device}: leave one of them out"
        )
    gpus = torch.cuda.device_count()
    if device.startswith("cuda") and num_gpus > gpus:
        raise ConfigError(
            f"--num-gpus is {num_gpus}, this machine has {gpus}; without any: {use_cpu}"
        )
    if amp and not gpus and not eval_only:
        raise ConfigError(f"{amp_key}: Detectron2 trains with mixed precision on a GPU only")
