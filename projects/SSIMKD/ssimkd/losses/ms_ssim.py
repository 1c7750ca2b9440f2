"""MS-SSIM: structural similarity of normalised maps at several resolutions."""

import math
from typing import Any, Dict, List, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.ssim import definition as ssim
from ssimkd.ssim.normalize import NORMALIZATIONS

from .base import MapLoss

# The least similarity in the product of powers, whose slope grows without bound towards 0
FLOOR = 0.1


@register_loss("ms_ssim")
class MSSSIMLoss(MapLoss):
    """(1 - MS-SSIM) / 2 per level, averaged over images and channels.

    Wang, Simoncelli, Bovik, "Multi-scale structural similarity for image quality assessment",
    Asilomar 2003: the product over scales of (mean contrast x structure)^exponent, with luminance
    at the coarsest scale only. The maps of the next scale are means of 2 x 2 cells, at an odd edge
    of the cells that exist. Two things differ from the MS-SSIM of an image:

    - Small maps. A further scale is used as long as its shorter side is at least the window. With
      a window of 11, a map whose shorter side has at most 20 cells has one scale, and its MS-SSIM
      is SSIM. The exponents of the scales used are scaled to the sum 1 (the published five have the
      sum 1.0001).
    - Negative similarity, which has no real power. In the product no mean counts for less than 0.1,
      and exponent x (mean - 0.1) is added for each that is lower. Where all means are at least 0.1
      the loss is that of Wang et al.; where all are lower MS-SSIM is their mean, weighted by the
      exponents. It grows with each mean, and one scale gives SSIM. Powers continued linearly one by
      one would not do: the product of two negative ones is positive.

    Args:
        weight (float): lambda.
        normalize, normalize_scope (str): see `normalize.py`; SSIM's dynamic range L follows.
        border, window_size, sigma, k1, k2: see :func:`ssimkd.ssim.ssim_map`.
        scale_exponents (sequence[float]): one per scale, the finest first; > 0.
    """

    def __init__(
        self,
        # As for SSIM, like all defaults down to k2
        weight: float = 4.0,
        normalize: str = "minmax",
        normalize_scope: str = "channel",
        border: str = "renormalize",
        window_size: int = 11,
        sigma: float = 1.5,
        k1: float = 0.01,
        k2: float = 0.03,
        # [Wang, Simoncelli, Bovik, 2003]
        scale_exponents: Sequence[float] = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333),
    ) -> None:
        super().__init__(weight, normalize, normalize_scope)
        self.options: Dict[str, Any] = dict(
            window_size=window_size,
            sigma=sigma,
            k1=k1,
            k2=k2,
            data_range=NORMALIZATIONS[normalize],
            border=border,
        )
        ssim.check_options(exponents=(1, 1, 1), **self.options)
        if not (scale_exponents and all(math.isfinite(e) and e > 0 for e in scale_exponents)):
            raise ValueError(
                f"scale_exponents must be finite numbers > 0, at least one, got {scale_exponents!r}"
            )
        self.scale_exponents = tuple(scale_exponents)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar in [0, 1] for (n, C, h, w) maps."""
        exponents = self.exponents_for(min(student.shape[-2:]))
        means = []
        for scale in range(len(exponents)):
            if scale > 0:
                student, teacher = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (student, teacher))
            luminance = 1 if scale == len(exponents) - 1 else 0
            terms = ssim.ssim_map(student, teacher, exponents=(luminance, 1, 1), **self.options)
            means.append(terms.mean(dim=(2, 3)))
        return (1 - combine(means, exponents).mean()) / 2

    def exponents_for(self, side: int) -> List[float]:
        """Exponents of the scales that a map has whose shorter side is `side` cells; sum 1."""
        used = [self.scale_exponents[0]]
        for exponent in self.scale_exponents[1:]:
            side = math.ceil(side / 2)
            if side < self.options["window_size"]:
                break
            used.append(exponent)
        return [exponent / sum(used) for exponent in used]


def combine(means: Sequence[Tensor], exponents: Sequence[float]) -> Tensor:
    """The product of powers, continued linearly where a mean is below FLOOR.

    Args:
        means (sequence[Tensor]): of each scale, all of one shape, in [-1, 1].
        exponents (sequence[float]): of each scale, > 0; their sum is 1.

    Returns:
        Tensor: of that shape, in [-1, 1]; it grows with each mean.
    """
    product, missing = torch.ones_like(means[0]), torch.zeros_like(means[0])
    for mean, exponent in zip(means, exponents):
        product = product * mean.clamp_min(FLOOR) ** exponent
        missing = missing + exponent * (mean - FLOOR).clamp_max(0)
    return product + missing
