"""The driver of a config: the module that builds, trains and evaluates its model."""

from types import ModuleType

from detectron2.config import CfgNode

from . import lazy_driver, yaml_driver


def driver_of(cfg) -> ModuleType:
    """`yaml_driver` for a CfgNode, `lazy_driver` for a LazyConfig.

    Both have the functions `build_with_teachers`, `train` and `evaluate`.
    """
    return yaml_driver if isinstance(cfg, CfgNode) else lazy_driver
