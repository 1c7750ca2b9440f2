"""SSIM of feature maps, in torch alone."""

from .definition import ssim_map
from .loss import ssim_loss

__all__ = ["ssim_loss", "ssim_map"]
