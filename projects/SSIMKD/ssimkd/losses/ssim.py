"""The paper's loss: structural similarity of normalised maps."""

from typing import Any, Dict, Sequence

from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.ssim import ssim_loss
from ssimkd.ssim.loss import check_options
from ssimkd.ssim.normalize import NORMALIZATIONS

from .base import MapLoss
from .context import Context


@register_loss("ssim")
class SSIMLoss(MapLoss):
    """(1 - SSIM) / 2 per level (de Rijk et al., NeurIPS 2022; SSIM of Wang et al., 2004).

    Args:
        weight (float): lambda.
        normalize, normalize_scope (str): see `ssim/normalize.py`; SSIM's dynamic range L follows.
        border, window_size, sigma, k1, k2, exponents: see :func:`ssimkd.ssim.ssim_map`.
        backend (str): what computes it; see :func:`ssimkd.ssim.ssim_loss`.
    """

    def __init__(
        self,
        weight: float = 4.0,  # [paper: 2 or 4; shapes: 64 and more, with clipped gradients]
        # [paper]; "teacher_range" is as good, "standardize" and "none" worse [shapes: normalize]
        normalize: str = "minmax",
        # not known from the paper; "image" is as good, "batch" is worse [shapes: scope]
        normalize_scope: str = "channel",
        border: str = "renormalize",  # "zero" is as good, "valid" lower [shapes: border]
        window_size: int = 11,  # [paper]; 3 to 15 are as good [shapes: window]
        sigma: float = 1.5,  # [paper]; 0.5 to 3 are as good [shapes: sigma]
        k1: float = 0.01,  # [paper]
        k2: float = 0.03,  # [paper]
        # [paper]; most of the loss's effect comes from the last one [shapes: components]
        exponents: Sequence[float] = (1.0, 1.0, 1.0),
        backend: str = "auto",
    ) -> None:
        super().__init__(weight, normalize, normalize_scope)
        self.options: Dict[str, Any] = dict(  # of ssim_map
            window_size=window_size,
            sigma=sigma,
            k1=k1,
            k2=k2,
            data_range=NORMALIZATIONS[normalize],
            exponents=tuple(exponents),
            border=border,
        )
        self.backend = backend
        check_options(normalize, normalize_scope, backend, **self.options)
        if not any(exponents):
            raise ValueError("exponents must not all be 0: nothing would be compared")

    def compare_level(
        self, level: str, student: Tensor, teacher: Tensor, context: Context
    ) -> Tensor:
        """Scalar in [0, 1], the mean over the images."""
        return ssim_loss(
            student,
            teacher,
            sizes=context.cells(level, student),
            normalize=self.normalize,
            normalize_scope=self.normalize_scope,
            backend=self.backend,
            **self.options,
        )
