"""Focal and global distillation (Yang et al., CVPR 2022)."""

from typing import Dict, Sequence

import torch
from torch import Tensor, nn

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_coefficients, check_positive

from .attention import channel_attention, spatial_attention
from .base import Context, KDLoss, Maps
from .blocks import ContextBlock


@register_loss("fgd")
class FGDLoss(KDLoss):
    """Squared error weighted by objects and attention, plus attention and context, per level.

        foreground sum M_fg A (S - T)^2 + background sum M_bg A (S - T)^2
        + attention (sum |A_s(S) - A_s(T)| + sum |A_c(S) - A_c(T)|)
        + relation sum (G_S(S) - G_T(T))^2,  A = A_s(T) A_c(T)

    Mean over images of what each gives alone. A_s and A_c: `attention.py`. M_fg: see
    :func:`foreground_mask`; M_bg: 1 / their number on the other cells of the image. G_S and G_T:
    two :class:`ContextBlock`, both trained, as in the authors' code; the loss of equal maps is 0
    until training parts them. That code (github.com/yzd-v/FGD) decides where it and the paper
    differ, but for boxes in padded images: it stretches them to the padded map, here they stay
    where they are. Most of its configs also start from the teacher's neck and head:
    MODEL.DISTILL.INHERIT.

    Args:
        weight (float): of the whole.
        temperature (float): of the attention, > 0.
        foreground, background, attention, relation (float): the paper's alpha, beta, gamma,
            lambda, for sums over elements.

    Raises:
        ValueError: an option is out of its range.
    """

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
        check_coefficients(
            foreground=foreground, background=background, attention=attention, relation=relation
        )
        self.temperature = temperature
        self.foreground, self.background = foreground, background
        self.attention, self.relation = attention, relation
        self.student_context, self.teacher_context = nn.ModuleDict(), nn.ModuleDict()

    def attach(self, channels: Dict[str, int], num_classes: int) -> None:
        """Makes two context blocks per level."""
        for level, width in channels.items():
            self.student_context[level] = ContextBlock(width)
            self.teacher_context[level] = ContextBlock(width)

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """See the head of `base.py`.

        Raises:
            ValueError: the batch has no ground truth.
        """
        if context.targets is None:
            raise ValueError(
                "MODEL.DISTILL.LOSSES: fgd needs the ground truth, and the batch has no "
                "instances; take fgd out, or train on annotated images"
            )
        losses = {}
        for level, s in student.items():
            boxes = [x.gt_boxes.tensor.to(s) / context.strides[level] for x in context.targets]
            masks = torch.stack([foreground_mask(x, s.shape[-2:]) for x in boxes])[:, None]
            crops = context.crops(level, s, teacher[level], masks)
            losses[level] = torch.stack(
                [self.compare(level, *maps) * share for maps, share in crops]
            ).sum()
        return losses

    def compare(self, level: str, student: Tensor, teacher: Tensor, objects: Tensor) -> Tensor:
        """Mean over n images; maps (n, C, h, w), `objects` is M_fg, (n, 1, h, w)."""
        others = (objects == 0).to(objects)
        others = others / others.sum(dim=(2, 3), keepdim=True).clamp_min(1)  # none: no term
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
    """1 / area in cells on the cells of a box, the largest where boxes overlap, 0 elsewhere.

    Args:
        boxes (Tensor): (B, 4), x0, y0, x1, y1 in cells; B may be 0. A box takes the columns
            floor(x0) to ceil(x1), both included, and the rows likewise: the authors' code.
        size (sequence[int]): H, W.

    Returns:
        Tensor: (H, W).
    """
    if len(boxes) == 0:
        return boxes.new_zeros(tuple(size))
    rows, columns = (torch.arange(n, device=boxes.device) for n in size)
    first, last = boxes[:, :2].floor(), boxes[:, 2:].ceil()  # (B, 2), x and y
    across = (columns >= first[:, :1]) & (columns <= last[:, :1])  # (B, W)
    down = (rows >= first[:, 1:]) & (rows <= last[:, 1:])  # (B, H)
    share = 1 / (last - first + 1).prod(dim=1)  # (B,)
    return (share[:, None, None] * (down[:, :, None] & across[:, None, :])).amax(dim=0)
