"""FGD: focal and global distillation (Yang et al., CVPR 2022)."""

from functools import partial
from typing import Dict, Sequence

import torch
from torch import Tensor, nn

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_factors, check_positive

from .attention import channel_attention, spatial_attention
from .base import KDLoss, Maps, in_float
from .context import Context


class ContextBlock(nn.Module):
    """F + g(sum over cells of softmax(k F) F): adds one vector per image to every cell.

    The block of GCNet (Cao et al., ICCVW 2019). The last layer of g starts at 0, so that the block
    starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attention = nn.Conv2d(channels, 1, 1, bias=False)  # the softmax would cancel a bias
        nn.init.kaiming_normal_(self.attention.weight)
        last = nn.Linear(hidden, channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.add = nn.Sequential(nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), last)

    def forward(self, maps: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, C, h, w)."""
        attention = self.attention(maps).flatten(2).softmax(dim=2)  # (n, 1, h w)
        pooled = (maps.flatten(2) * attention).sum(dim=2)  # (n, C)
        return maps + self.add(pooled)[:, :, None, None]


@register_loss("fgd")
class FGDLoss(KDLoss):
    """Squared error weighted by objects and attention, plus differences of attention and context.

        foreground sum M_fg A (S - T)^2 + background sum M_bg A (S - T)^2
        + attention (sum |A_s(S) - A_s(T)| + sum |A_c(S) - A_c(T)|)
        + relation sum (G_S(S) - G_T(T))^2,  A = A_s(T) A_c(T)

    per level, averaged over images. Yang et al., "Focal and Global Knowledge Distillation for
    Detectors", CVPR 2022. A_s and A_c: see `attention.py`. M_fg: see :func:`foreground_mask`. M_bg
    is 1 / n on the n cells of the image that are in no box. G_S and G_T: one :class:`ContextBlock`
    each, both trained, as in the authors' code (github.com/yzd-v/FGD).

    Where code and paper differ, the code is followed, with one exception: it stretches the boxes of
    a padded image to the padded map, and here they stay in place. Most of the authors' configs also
    start from the teacher's neck and head, see MODEL.DISTILL.INHERIT. Images without labels take no
    part.

    Args:
        weight (float): factor of the whole loss.
        temperature (float): of the attention, > 0.
        foreground, background, attention, relation (float): the paper's alpha, beta, gamma and
            lambda, for sums over elements.
    """

    needs_boxes = True

    def __init__(
        self,
        # [authors: for Faster and Mask R-CNN; in brackets for RetinaNet; then FCOS and RepPoints]
        weight: float = 1.0,
        temperature: float = 0.5,  # (0.5; 0.8 and 0.5)
        foreground: float = 5e-5,  # (1e-3; 1.6e-3)
        background: float = 2.5e-5,  # (5e-4; 8e-4)
        attention: float = 5e-5,  # (5e-4, in the paper 1e-3; 8e-4)
        relation: float = 5e-7,  # (5e-6; 8e-6)
    ) -> None:
        super().__init__(weight)
        check_positive(temperature=temperature)
        check_factors(
            foreground=foreground, background=background, attention=attention, relation=relation
        )
        self.temperature = temperature
        self.foreground, self.background = foreground, background
        self.attention, self.relation = attention, relation
        self.student_context, self.teacher_context = nn.ModuleDict(), nn.ModuleDict()

    def attach(self, channels: Dict[str, int], num_classes: int) -> None:
        """Makes G_S and G_T, one of each per level."""
        for level, width in channels.items():
            self.student_context[level] = ContextBlock(width)
            self.teacher_context[level] = ContextBlock(width)

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """Level -> scalar >= 0; raises ConfigError without ground truth."""
        student, teacher = in_float(student, teacher)
        targets = context.require_targets(self.name)
        like = next(iter(student.values()))
        images = [x.gt_boxes.tensor.to(like, non_blocking=True) for x in targets]
        losses = {}
        for level, s in student.items():
            stride = context.strides[level]
            masks = [foreground_mask(boxes / stride, s.shape[-2:]) for boxes in images]
            maps = s, teacher[level], torch.stack(masks)[:, None]
            losses[level] = context.mean(level, partial(self.compare, level), *maps)
        return losses

    def compare(self, level: str, student: Tensor, teacher: Tensor, objects: Tensor) -> Tensor:
        """Mean over n images of (n, C, h, w) maps; `objects` is M_fg, (n, 1, h, w)."""
        others = (objects == 0).to(objects)
        others = others / others.sum(dim=(2, 3), keepdim=True).clamp_min(1)  # M_bg
        where = spatial_attention(teacher, self.temperature)
        which = channel_attention(teacher, self.temperature)
        where_gap = (spatial_attention(student, self.temperature) - where).abs().sum()
        which_gap = (channel_attention(student, self.temperature) - which).abs().sum()
        importance = where * which * (self.foreground * objects + self.background * others)
        relation = self.student_context[level](student) - self.teacher_context[level](teacher)
        total = (
            (importance * (student - teacher).square()).sum()
            + self.attention * (where_gap + which_gap)
            + self.relation * relation.square().sum()
        )
        return total / len(student)


def foreground_mask(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """M_fg, (H, W): 1 / area on the cells of a box, the largest where boxes overlap, 0 elsewhere.

    Args:
        boxes (Tensor): (B, 4), x0, y0, x1, y1 in cells; B may be 0. As in the authors' code, a box
            covers the columns floor(x0) to ceil(x1), both included, and the rows likewise.
        size (sequence[int]): H, W.
    """
    if len(boxes) == 0:
        return boxes.new_zeros(tuple(size))
    rows, columns = (torch.arange(n, device=boxes.device) for n in size)
    first, last = boxes[:, :2].floor(), boxes[:, 2:].ceil()  # (B, 2), x and y
    across = (columns >= first[:, :1]) & (columns <= last[:, :1])  # (B, W)
    down = (rows >= first[:, 1:]) & (rows <= last[:, 1:])  # (B, H)
    share = 1 / (last - first + 1).prod(dim=1)  # (B,), of the whole box in cells
    return (share[:, None, None] * (down[:, :, None] & across[:, None, :])).amax(dim=0)
