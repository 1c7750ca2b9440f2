"""The losses, one file each; `MODEL.DISTILL.LOSSES` picks them from the registry by name."""

from .base import KD_LOSS_REGISTRY, Context, KDLoss, MapLoss, register_loss
from .build import build_loss
from .cwd import CWDLoss
from .defeat import DeFeatLoss
from .fgd import FGDLoss
from .fkd import FKDLoss
from .icd import ICDLoss
from .lp import L1Loss, L2Loss
from .mgd import MGDLoss
from .ms_ssim import MSSSIMLoss
from .pkd import PKDLoss
from .ssim import SSIMLoss

__all__ = [
    "KD_LOSS_REGISTRY",
    "CWDLoss",
    "Context",
    "DeFeatLoss",
    "FGDLoss",
    "FKDLoss",
    "ICDLoss",
    "KDLoss",
    "L1Loss",
    "L2Loss",
    "MGDLoss",
    "MSSSIMLoss",
    "MapLoss",
    "PKDLoss",
    "SSIMLoss",
    "build_loss",
    "register_loss",
]
