"""The losses, one file each; `MODEL.DISTILL.LOSSES` picks them from the registry by name."""

from .base import KD_LOSS_REGISTRY, Context, KDLoss, MapLoss, register_loss
from .cwd import CWDLoss
from .defeat import DeFeatLoss
from .icd import ICDLoss
from .lp import L1Loss, L2Loss
from .ms_ssim import MSSSIMLoss
from .pkd import PKDLoss
from .ssim import SSIMLoss

__all__ = [
    "KD_LOSS_REGISTRY",
    "CWDLoss",
    "Context",
    "DeFeatLoss",
    "ICDLoss",
    "KDLoss",
    "L1Loss",
    "L2Loss",
    "MSSSIMLoss",
    "MapLoss",
    "PKDLoss",
    "SSIMLoss",
    "register_loss",
]
