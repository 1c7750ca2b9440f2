"""One setting in both kinds of config: its key in a `.yaml` and in a `.py`."""

import copy
from typing import Any, Dict, List

from detectron2.config import CfgNode
from detectron2.utils.registry import locate
from omegaconf import ListConfig, OmegaConf

KEYS = {  # name -> key in a CfgNode, and in a DictConfig
    "amp": ("SOLVER.AMP.ENABLED", "train.amp.enabled"),
    "batch": ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size"),
    "device": ("MODEL.DEVICE", "train.device"),
    "iterations": ("SOLVER.MAX_ITER", "train.max_iter"),
    "output": ("OUTPUT_DIR", "train.output_dir"),
    "TEST": ("DATASETS.TEST", "dataloader.test.dataset.names"),
    "TRAIN": ("DATASETS.TRAIN", "dataloader.train.dataset.names"),
    "UNLABELED": ("DATASETS.UNLABELED", "dataloader.unlabeled.dataset.names"),
    "unlabeled batch": (
        "SOLVER.IMS_PER_BATCH_UNLABELED",
        "dataloader.unlabeled.total_batch_size",
    ),
    "weights": ("MODEL.WEIGHTS", "train.init_checkpoint"),
}
# Backbones that load weights of torchvision or timm: nodes of a CfgNode, classes of a DictConfig.
BACKBONE_NODES = ("TORCHVISION", "TIMM")
BACKBONES = ("TorchvisionBackbone", "TimmBackbone")


def key_of(cfg: Any, name: str) -> str:
    """The key of a setting of KEYS in a config of either kind."""
    return KEYS[name][not isinstance(cfg, CfgNode)]


def setting(cfg: Any, name: str) -> Any:
    """The value of a setting of KEYS, or None where the config does not have it."""
    return value_of(cfg, key_of(cfg, name))


def names_of(cfg: Any, split: str) -> List[str]:
    """Names of the data sets of a split, "TRAIN", "TEST" or "UNLABELED"."""
    names = setting(cfg, split) or []
    return list(names) if isinstance(names, (ListConfig, list, tuple)) else [names]


def unlabeled_batch(cfg: Any) -> int:
    """Images without labels in a step, in all processes together; 0 where the run has none."""
    has_names = not isinstance(cfg, CfgNode) or cfg.DATASETS.UNLABELED
    return (setting(cfg, "unlabeled batch") or 0) if has_names else 0


def datasets_of(cfg: Any, *splits: str) -> Dict[str, List[str]]:
    """The key of each split -> the names of its data sets."""
    return {key_of(cfg, split): names_of(cfg, split) for split in splits}


def value_of(cfg: Any, key: str, default: Any = None) -> Any:
    """The value of a dotted key, or the default where the config does not have it."""
    if not isinstance(cfg, CfgNode):
        return OmegaConf.select(cfg, key, default=default)
    for part in key.split("."):
        cfg = cfg.get(part, default) if isinstance(cfg, CfgNode) else default
    return cfg


def target_of(node: Any) -> Any:
    """The function or class that a lazy node calls. A saved config holds its name as text."""
    return locate(node._target_) if isinstance(node._target_, str) else node._target_


def without_pretraining(cfg: Any) -> Any:
    """A copy of a config whose backbone of torchvision or timm starts with random weights.

    For a model that gets all of its weights from a checkpoint: nothing is downloaded in vain.

    Args:
        cfg (CfgNode or DictConfig): of either kind; with `model` in a DictConfig.
    """
    cfg = copy.deepcopy(cfg)
    if isinstance(cfg, CfgNode):
        cfg.defrost()
        for node in BACKBONE_NODES:
            if node in cfg.MODEL:
                cfg.MODEL[node].WEIGHTS = ""
        return cfg
    nodes = [cfg.model]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ListConfig):
            nodes += [item for item in node if OmegaConf.is_config(item)]
            continue
        target = node.get("_target_", "")
        if getattr(target, "__name__", str(target)).endswith(BACKBONES):
            node.weights = ""
        nodes += [item for item in node.values() if OmegaConf.is_config(item)]
    return cfg


def for_inference(cfg: Any) -> Any:
    """A copy of a config whose student has no teacher; see also :func:`without_pretraining`."""
    cfg = without_pretraining(cfg)
    if not isinstance(cfg, CfgNode):
        if "distiller" in cfg.model:
            cfg.model.distiller = None
    elif "DISTILL" in cfg.MODEL:
        cfg.MODEL.DISTILL.LOSSES, cfg.MODEL.DISTILL.TEACHERS = (), []
    return cfg
