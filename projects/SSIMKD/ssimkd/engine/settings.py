"""The settings of a config that the drivers themselves read."""

import sys
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping

from detectron2.config import CfgNode
from omegaconf import ListConfig

from ssimkd.errors import ConfigError, as_config_error
from ssimkd.modeling.several_teachers import name_of_entry
from ssimkd.utils.config_keys import setting, value_of
from ssimkd.utils.validate import check_integers

CHECK_IMAGES = 8


@dataclass
class DriverSettings:
    """Settings of the training loop. They stand in MODEL.DISTILL (`.yaml`) or in train (`.py`).

    Attributes:
        inherit (dict[str, list[str]]): teacher's name ("" if there is one teacher) -> modules of
            the student that start from its weights, see `teacher/inherit.py`.
        check_images (int): training images on which teacher and student are checked before the
            first iteration, see `preflight.py`; 0 leaves out the check.
        skip_nonfinite_steps (int): steps with NaN or infinity that a run leaves out before it
            stops, see `finite_steps.py`.
        wandb_project (str): project in Weights & Biases; "" leaves it out.
        iterations (int): of the run.
    """

    inherit: Dict[str, List[str]]
    check_images: int
    skip_nonfinite_steps: int
    wandb_project: str
    iterations: int


def read_settings(cfg: Any) -> DriverSettings:
    """The driver's settings of a config (CfgNode or DictConfig).

    Raises:
        ConfigError: a setting has the wrong type.
    """
    yaml = isinstance(cfg, CfgNode)

    def read(name: str, default: Any) -> Any:
        return value_of(cfg, f"MODEL.DISTILL.{name.upper()}" if yaml else f"train.{name}", default)

    numbers = {
        "check_images": read("check_images", CHECK_IMAGES),
        "skip_nonfinite_steps": read("skip_nonfinite_steps", 0),
    }
    with as_config_error("MODEL.DISTILL" if yaml else "train"):
        check_integers(**numbers)
    inherit = read("inherit", [])
    if yaml and cfg.MODEL.DISTILL.TEACHERS:
        inherit = {
            name_of_entry(entry, number): entry.get("INHERIT", [])
            for number, entry in enumerate(cfg.MODEL.DISTILL.TEACHERS, start=1)
            if isinstance(entry, Mapping)
        }
    by_teacher = inherit if isinstance(inherit, Mapping) else {"": inherit}
    return DriverSettings(
        inherit={str(name): modules_of(modules) for name, modules in by_teacher.items()},
        wandb_project=str(read("wandb_project", "")),
        iterations=setting(cfg, "iterations") or sys.maxsize,
        **numbers,
    )


def modules_of(modules: Any) -> List[str]:
    """INHERIT as a list. Raises ConfigError unless it holds different names of modules."""
    listed = isinstance(modules, (list, tuple, ListConfig))
    if not listed or not all(isinstance(name, str) for name in modules):
        raise ConfigError(f"INHERIT must be a list of names of modules, got {modules!r}")
    if len(set(modules)) < len(modules):
        raise ConfigError(f"INHERIT names a module twice: {', '.join(modules)}")
    return list(modules)
