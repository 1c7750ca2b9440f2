"""PKD: Pearson correlation of student and teacher maps (Cao et al., NeurIPS 2022)."""

from typing import Dict

from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.ssim.normalize import normalize_maps

from .base import KDLoss, Maps
from .context import Context


@register_loss("pkd")
class PKDLoss(KDLoss):
    """1 - r per level, averaged over channels; r is the Pearson correlation of a channel.

    Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient", NeurIPS 2022. r is taken over the cells of all images of the batch together, so
    a large image has a large share. Scale and offset of a channel do not matter. A channel costs
    1/2 where one of its maps is constant, and 0 where both are; it then has no gradient.

    With z = (x - mean) / deviation, the loss is mean (z_S - z_T)^2 / 2, the paper's form. It equals
    1 - r for the biased deviation. The authors' code divides by n - 1 in place of n cells, so that
    its loss is (n - 1) / n of this one, and adds 1e-6 to each deviation, in feature units.

    Args:
        weight (float): lambda.
    """

    def __init__(
        self,
        weight: float = 6.0,  # for Faster R-CNN on p2 to p5; 10 for RetinaNet [authors]
    ) -> None:
        super().__init__(weight)

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """Level -> scalar in [0, 2]."""
        losses = {}
        for level, maps in student.items():
            inside = context.inside(level, maps)
            # All images in one row: (N, C, H, W) -> (1, C, 1, N H W)
            s, t = (x.transpose(0, 1).flatten(1)[None, :, None] for x in (maps, teacher[level]))
            if inside is not None:
                inside = inside.flatten()[None, None, None]  # (1, 1, 1, N H W)
            s, t = normalize_maps(s, t, "standardize", "channel", inside)
            squares = (s - t).square()
            if inside is not None:
                squares = squares.masked_fill(~inside, 0)
            cells = sum(h * w for h, w in context.cells(level, maps))
            losses[level] = squares.sum() / (2 * cells * maps.shape[1])
        return losses
