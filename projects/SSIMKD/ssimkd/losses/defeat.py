"""DeFeat: objects and background have separate weights (Guo et al., CVPR 2021)."""

from typing import Dict, Sequence

import torch
from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_factors

from .base import KDLoss, Maps, in_float
from .context import Context

# A box belongs to the finest level if its side, the root of its area, is below twice this number of
# pixels, to the next level if it is below four times it, and so on [authors; as FPN's p2, p3, ...]
FINEST_SIDE = 56


@register_loss("defeat")
class DeFeatLoss(KDLoss):
    """1 / L (a mean_objects (S - T)^2 / 2 + b mean_background (S - T)^2 / 2) for each of L levels.

    The loss on the neck of Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR
    2021, with the masks of their code. Each ground-truth box belongs to one level, by its size. It
    covers the cells from the one of its upper left corner to the one before that of its lower right
    corner, and at least the first. All other cells of the level are background. The means are taken
    over the cells of all images and over channels; a mean over no cells is 0. Images without labels
    take no part.

    Two parts of the authors' method are left out: the 3 x 3 convolution that they train between the
    student's maps and this loss (MODEL.DISTILL.ADAPTER is similar), and their loss on the head.

    Args:
        weight (float): lambda.
        foreground_weight, background_weight (float): a and b, >= 0.
    """

    needs_boxes = True

    def __init__(
        self,
        weight: float = 1.0,
        # [authors: for VOC; for COCO they give 4 and 16, beside losses on backbone and head]
        foreground_weight: float = 3.0,
        background_weight: float = 12.0,
    ) -> None:
        super().__init__(weight)
        check_factors(foreground_weight=foreground_weight, background_weight=background_weight)
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """Level -> scalar >= 0; raises ConfigError without ground truth."""
        student, teacher = in_float(student, teacher)
        targets = context.require_targets(self.name)
        device = next(iter(student.values())).device
        images = [x.gt_boxes.tensor.to(device, non_blocking=True) for x in targets]
        ranks = [level_ranks(boxes, len(student)) for boxes in images]
        finest_first = sorted(student, key=lambda level: context.strides[level])
        losses = {}
        for rank, level in enumerate(finest_first):
            s, t = student[level], teacher[level]
            masks = [
                box_cells(boxes / context.strides[level], own == rank, s.shape[-2:])
                for boxes, own in zip(images, ranks)
            ]
            objects = torch.stack(masks)[:, None]
            inside = context.inside(level, s)
            if inside is None:
                inside = torch.ones_like(objects)
            squares = (s - t).square().mean(1, keepdim=True)
            foreground = mean_where(objects & inside, squares)
            background = mean_where(~objects & inside, squares)
            both = self.foreground_weight * foreground + self.background_weight * background
            losses[level] = both / (2 * len(student))
        return {level: losses[level] for level in student}


def level_ranks(boxes: Tensor, levels: int) -> Tensor:
    """Rank of the level of each box, (B,), 0 for the finest of `levels`.

    Args:
        boxes (Tensor): (B, 4), x0, y0, x1, y1 in pixels.
        levels (int): number of levels.
    """
    sides = boxes[:, 2:] - boxes[:, :2] + 1  # the pixels of both ends count [authors]
    # The tolerance is for sides that rounding leaves just below a limit [authors]
    limits = FINEST_SIDE * (2.0 ** torch.arange(1, levels, device=boxes.device) - 1e-6)
    return (sides.prod(dim=1).sqrt()[:, None] >= limits).sum(dim=1)


def box_cells(boxes: Tensor, use: Tensor, size: Sequence[int]) -> Tensor:
    """The cells of one map that lie in a box, (H, W).

    Args:
        boxes (Tensor): (B, 4), x0, y0, x1, y1 in cells; B may be 0.
        use (Tensor): (B,), false for boxes that do not count.
        size (sequence[int]): H, W.
    """
    rows, columns = (torch.arange(n, device=boxes.device) for n in size)
    left, top, right, bottom = boxes.long().T[:, :, None]  # (B, 1) each
    thin = (left == right) | (top == bottom)  # such a box has one cell [authors]
    right = torch.where(thin, left + 1, right)
    bottom = torch.where(thin, top + 1, bottom)
    across = (columns >= left) & (columns < right) & use[:, None]  # (B, W)
    down = (rows >= top) & (rows < bottom)  # (B, H)
    return (down[:, :, None] & across[:, None, :]).any(dim=0)


def mean_where(mask: Tensor, values: Tensor) -> Tensor:
    """Mean of the values where the mask is true; 0 where it is nowhere true."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)
