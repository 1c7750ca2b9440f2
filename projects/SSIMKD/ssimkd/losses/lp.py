"""The pixel-wise losses that the paper compares SSIM with (FitNets, Romero et al., ICLR 2015)."""

from torch import Tensor

from ssimkd.registry import register_loss

from .base import MapLoss


@register_loss("l1")
class L1Loss(MapLoss):
    """mean |S - T| per level.

    Args:
        weight (float): lambda.
        normalize, normalize_scope (str): see `ssim/normalize.py`; "none": raw features.
    """

    def __init__(
        self,
        weight: float = 4.0,  # as for SSIM [shapes: 256]
        normalize: str = "minmax",  # as for SSIM
        normalize_scope: str = "channel",
    ) -> None:
        super().__init__(weight, normalize, normalize_scope)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar >= 0 for (n, C, h, w) maps."""
        return (student - teacher).abs().mean()


@register_loss("l2")
class L2Loss(MapLoss):
    """mean (S - T)^2 per level; the arguments are those of :class:`L1Loss`."""

    def __init__(
        self,
        weight: float = 100.0,  # the best of 6.25 to 400 [shapes]
        normalize: str = "minmax",  # as for SSIM
        normalize_scope: str = "channel",
    ) -> None:
        super().__init__(weight, normalize, normalize_scope)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar >= 0 for (n, C, h, w) maps."""
        return (student - teacher).square().mean()
