"""PKD: Pearson correlation of student and teacher maps (Cao et al., NeurIPS 2022)."""

from typing import Dict, Optional

import torch.nn.functional as F
from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.ssim.normalize import normalize_maps

from .base import Context, KDLoss, Maps


@register_loss("pkd")
class PKDLoss(KDLoss):
    """1 - r per level, r the Pearson correlation of a channel over a batch, averaged over channels.

    Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient", NeurIPS 2022. A channel takes part with the cells of all images at once, those
    outside an image excepted, so an image's share follows its size; scale and offset of a channel
    do not matter. A channel that is flat in one map costs 1/2, without gradient; in both, 0.

    The deviation is the biased one, for which mean (z_S - z_T)^2 / 2 is 1 - r as in the paper. The
    authors' code divides n cells' squares by n - 1, which makes its loss (n - 1) / n of this one;
    it also adds 1e-6 to each deviation, in feature units.

    Args:
        weight (float): lambda.

    Raises:
        ValueError: the weight is out of its range.
    """

    def __init__(
        self,
        weight: float = 6.0,  # of Faster R-CNN on p2 to p5; 10 for RetinaNet on p3 to p6 [authors]
    ) -> None:
        super().__init__(weight)

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """Level -> scalar in [0, 2]."""
        losses = {}
        for level in student:
            inside = context.inside(level, student[level])
            s, t = (_as_one_image(maps[level], inside) for maps in (student, teacher))
            losses[level] = F.mse_loss(*normalize_maps(s, t, "standardize", "channel", None)) / 2
        return losses


def _as_one_image(maps: Tensor, inside: Optional[Tensor]) -> Tensor:
    """All cells of a batch that lie in an image, in one row: (N, C, H, W) -> (1, C, 1, cells)."""
    cells = maps.transpose(0, 1).flatten(1)
    if inside is not None:
        cells = cells[:, inside.flatten()]
    return cells[None, :, None]
