"""SSIMKD: structural knowledge distillation for object detection on Detectron2.

Importing it registers the meta-architectures, the losses and the embedded data set.
"""

from contextlib import suppress

from . import known_warnings  # noqa: F401 (first)
from .config import add_ssimkd_config
from .distiller import Distiller
from .distillers import Distillers
from .errors import ConfigError
from .losses import KD_LOSS_REGISTRY
from .meta_arch import DistillMixin, DistillPanopticFPN, DistillRCNN, DistillRetinaNet
from .shapes import register_search, register_shapes

with suppress(ImportError):  # Detectron2 v0.5 has no FCOS
    from .meta_arch import DistillFCOS  # noqa: F401

__all__ = [
    "KD_LOSS_REGISTRY",
    "ConfigError",
    "DistillMixin",
    "DistillPanopticFPN",
    "DistillRCNN",
    "DistillRetinaNet",
    "Distiller",
    "Distillers",
    "add_ssimkd_config",
]

register_shapes()
register_search()
