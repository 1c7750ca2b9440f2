"""DeFeat: objects and background weighted apart (Guo et al., CVPR 2021)."""

from typing import Dict, List

import torch
from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_coefficients

from .base import Context, KDLoss, Maps

# Pixels: a box of side (root of its area) below twice this goes to the finest level, below four
# times to the next, ... [authors; FPN's rule for p2, p3, ...]
FINEST_SIDE = 56


@register_loss("defeat")
class DeFeatLoss(KDLoss):
    """1 / L (a mean_objects (S - T)^2 / 2 + b mean_background (S - T)^2 / 2) for each of L levels.

    The neck's part of Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021,
    with the masks of its code. Each ground-truth box belongs to one level, by its size, and marks
    the cells from its left upper corner's up to, but without, its right lower corner's, at least
    the first one; every other cell of the level is background. The means run over the cells of a
    batch and their channels, those outside an image excepted; of no cells, they are 0. Left out:
    the 3 x 3 convolution, with weights near 0 at the start, that the authors train between the
    student's maps and this loss (MODEL.DISTILL.ADAPTER is the nearest), and their loss on the head.

    Args:
        weight (float): lambda.
        foreground_weight, background_weight (float): a and b, >= 0.

    Raises:
        ValueError: an option is out of its range; in a call, the batch has no ground truth.
    """

    def __init__(
        self,
        weight: float = 1.0,
        # [authors: for VOC; for COCO they give 4 and 16, beside losses on backbone and head]
        foreground_weight: float = 3.0,
        background_weight: float = 12.0,
    ) -> None:
        super().__init__(weight)
        check_coefficients(foreground_weight=foreground_weight, background_weight=background_weight)
        self.foreground_weight = float(foreground_weight)
        self.background_weight = float(background_weight)

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """Level -> scalar >= 0."""
        if context.targets is None:
            raise ValueError("the loss defeat needs ground-truth boxes: inputs with `instances`")
        images = [instances.gt_boxes.tensor for instances in context.targets]
        owners = [owning_levels(boxes, len(student)) for boxes in images]
        finest_first = sorted(student, key=lambda level: context.strides[level])
        losses = {}
        for level in student:
            rank, stride = finest_first.index(level), context.strides[level]
            own = [boxes[owner == rank] for boxes, owner in zip(images, owners)]
            objects = box_cells(own, stride, student[level])
            inside = context.inside(level, student[level])
            squares = (student[level] - teacher[level]).square().mean(1, keepdim=True)
            inside = torch.ones_like(objects) if inside is None else inside
            foreground = _mean(squares, objects & inside)
            background = _mean(squares, ~objects & inside)
            both = self.foreground_weight * foreground + self.background_weight * background
            losses[level] = both / (2 * len(student))
        return losses


def owning_levels(boxes: Tensor, levels: int) -> Tensor:
    """Rank of the level that each box belongs to, 0 the finest of `levels`: (B, 4) -> (B,)."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1  # both end pixels count [authors]
    # a side that rounding leaves just below its limit has reached it [authors]
    limits = FINEST_SIDE * (2.0 ** torch.arange(1, levels, device=boxes.device) - 1e-6)
    return (sides.prod(dim=1).sqrt()[:, None] >= limits).sum(dim=1)


def box_cells(images: List[Tensor], stride: int, maps: Tensor) -> Tensor:
    """(N, 1, H, W), true for the cells of `maps` in a box of the image, (B, 4) pixels each."""
    height, width = maps.shape[-2:]
    rows = torch.arange(height, device=maps.device)
    columns = torch.arange(width, device=maps.device)
    masks = []
    for boxes in images:
        left, top, right, bottom = (boxes.to(maps.device) / stride).long().T[:, :, None]
        thin = (left == right) | (top == bottom)  # marks its first cell [authors]
        right = torch.where(thin, left + 1, right)
        bottom = torch.where(thin, top + 1, bottom)
        across = (columns >= left) & (columns < right)  # (B, W)
        down = (rows >= top) & (rows < bottom)  # (B, H)
        masks.append((down[:, :, None] & across[:, None, :]).any(dim=0))
    return torch.stack(masks)[:, None]


def _mean(squares: Tensor, mask: Tensor) -> Tensor:
    """Mean of (N, 1, H, W) squares where the mask is true; 0 where it is nowhere."""
    return squares.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)
