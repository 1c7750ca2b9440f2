"""From a command line to a config that can run."""

import os
from contextlib import contextmanager
from typing import Iterator, List, Sequence

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg

from .config import add_ssimkd_config
from .data import check_datasets, lazy_use_own_data, use_own_data
from .errors import ConfigError, one_line
from .lazy import lazy_names


def load_config(path: str, overrides: List[str], splits: Sequence[str] = ("TRAIN", "TEST")):
    """The config of a file: a CfgNode (`.yaml`) or a DictConfig (`.py`).

    Args:
        path (str): the file.
        overrides (list[str]): "KEY", "value", ... for `.yaml`; "key=value", ... for `.py`.
        splits (sequence[str]): "TRAIN", "TEST": whose own data is registered (`DATASETS.COCO`).

    Raises:
        ConfigError: it cannot be read, an override does not apply, or its own data is wrong.
    """
    if not path:
        raise ConfigError(
            "--config-file is missing, for example --config-file configs/ssimkd_R50.yaml"
        )
    try:
        if path.endswith(".py"):
            cfg = LazyConfig.load(path)
            check_overrides(cfg, overrides)
            cfg = LazyConfig.apply_overrides(cfg, overrides)
        else:
            cfg = get_cfg()
            add_ssimkd_config(cfg)
            cfg.merge_from_file(path)
            cfg.merge_from_list(overrides)
    except ConfigError:
        raise
    except Exception as error:
        extra = f" with {' '.join(overrides)}" if overrides else ""
        raise ConfigError(f"{path}{extra}: {one_line(error)}") from error
    if isinstance(cfg, CfgNode):
        use_own_data(cfg, splits)
        cfg.freeze()
    else:
        lazy_use_own_data(cfg, splits)
    return cfg


def check_overrides(cfg, overrides: Sequence[str]) -> None:
    """Raises ConfigError for an override of a LazyConfig that would only make a key of its own."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: an override of a .py config is written key=value")
        if key[0] not in "+~" and key.split(".")[0] not in cfg:
            raise ConfigError(f"{key}: there are the keys {', '.join(cfg)}")


@contextmanager
def writing_to(key: str, folder: str) -> Iterator[None]:
    """Around the first writing to a run's folder: that it cannot is a ConfigError with the key."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{key}: cannot write to {folder}: {one_line(error)}") from error


def check_config(cfg, *, eval_only: bool, resume: bool, num_gpus: int) -> None:
    """Raises ConfigError for what would fail later and less clearly: missing files and devices."""
    if isinstance(cfg, CfgNode):
        used = {"DATASETS.TEST": cfg.DATASETS.TEST, "DATASETS.TRAIN": cfg.DATASETS.TRAIN}
        device, use_cpu = cfg.MODEL.DEVICE, "MODEL.DEVICE cpu"
        amp, amp_key = cfg.SOLVER.AMP.ENABLED, "SOLVER.AMP.ENABLED"
        weights, weights_key = cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS"
    else:
        used = {key: names for names, key in (lazy_names(cfg, s) for s in ("TEST", "TRAIN"))}
        device, use_cpu = cfg.train.device, "train.device=cpu"
        amp, amp_key = cfg.train.amp.enabled, "train.amp.enabled"
        weights, weights_key = cfg.train.init_checkpoint, "train.init_checkpoint"
    for key, names in list(used.items())[: 1 if eval_only else 2]:
        check_datasets(names, key)
    if eval_only and not weights and not resume:
        raise ConfigError(f"{weights_key} is empty: name the checkpoint to evaluate")
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
