"""SSIMKD: structural knowledge distillation for object detection on Detectron2.

Importing it registers meta-architectures, losses and the Shapes data with Detectron2, and
changes nothing else.
"""

import warnings
from contextlib import suppress
from importlib import import_module
from typing import Any

# Detectron2 compiles small functions when it is imported, and newer versions of torch warn of that.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
    import detectron2.modeling  # noqa: F401

from ssimkd.config import add_ssimkd_config
from ssimkd.data.shapes import register_search, register_shapes
from ssimkd.errors import ConfigError
from ssimkd.losses import KD_LOSS_REGISTRY
from ssimkd.modeling.backbones import TimmBackbone, TorchvisionBackbone
from ssimkd.modeling.distiller import Distiller
from ssimkd.modeling.meta_arch import (
    DistillMixin,
    DistillPanopticFPN,
    DistillRCNN,
    DistillRetinaNet,
)
from ssimkd.modeling.several_teachers import Distillers

with suppress(ImportError):  # Detectron2 v0.5 has no FCOS
    from ssimkd.modeling.meta_arch import DistillFCOS  # noqa: F401


def __getattr__(name: str) -> Any:
    places = {"build_student": "student", "load_config": "arguments"}
    if name in places:  # the drivers take long to import
        return getattr(import_module(f"ssimkd.engine.{places[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "KD_LOSS_REGISTRY",
    "ConfigError",
    "DistillMixin",
    "DistillPanopticFPN",
    "DistillRCNN",
    "DistillRetinaNet",
    "Distiller",
    "Distillers",
    "TimmBackbone",
    "TorchvisionBackbone",
    "add_ssimkd_config",
    "build_student",
    "load_config",
]

register_shapes()
register_search()
