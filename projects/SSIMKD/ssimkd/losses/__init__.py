"""The losses, one file each; `MODEL.DISTILL.LOSSES` picks them from the registry by name."""

from .base import KD_LOSS_REGISTRY, Context, KDLoss, MapLoss, register_loss
from .fgd import FGDLoss
from .fkd import FKDLoss
from .lp import L1Loss, L2Loss
from .mgd import MGDLoss
from .ssim import SSIMLoss

__all__ = [
    "KD_LOSS_REGISTRY",
    "Context",
    "FGDLoss",
    "FKDLoss",
    "KDLoss",
    "L1Loss",
    "L2Loss",
    "MGDLoss",
    "MapLoss",
    "SSIMLoss",
    "register_loss",
]
