"""The losses, one file each; `MODEL.DISTILL.LOSSES` picks them from the registry by name."""

from .base import KD_LOSS_REGISTRY, Context, KDLoss, MapLoss, register_loss
from .icd import ICDLoss
from .lp import L1Loss, L2Loss
from .ssim import SSIMLoss

__all__ = [
    "KD_LOSS_REGISTRY",
    "Context",
    "ICDLoss",
    "KDLoss",
    "L1Loss",
    "L2Loss",
    "MapLoss",
    "SSIMLoss",
    "register_loss",
]
