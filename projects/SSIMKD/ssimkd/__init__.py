"""SSIMKD: structural knowledge distillation for object detection on Detectron2.

Importing it registers the meta-architectures, the losses and the embedded data set.
"""

from .config import add_ssimkd_config
from .distiller import Distiller
from .errors import ConfigError
from .losses import KD_LOSS_REGISTRY
from .meta_arch import DistillMixin, DistillRCNN
from .shapes import register_shapes

__all__ = [
    "KD_LOSS_REGISTRY",
    "ConfigError",
    "DistillMixin",
    "DistillRCNN",
    "Distiller",
    "add_ssimkd_config",
]

register_shapes()
