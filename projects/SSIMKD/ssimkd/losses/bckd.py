"""BCKD: the classes of a dense head as binary maps, and overlaps (Yang et al., ICCV 2023)."""

from typing import Dict

import torch
from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_factors

from .base import KDLoss
from .context import Context
from .predictions import Predictions, binary_cross_entropy, giou_cost


@register_loss("bckd")
class BCKDLoss(KDLoss):
    """Binary cross-entropies and box distances, weighted by how far the scores are apart.

        cls  factor / P sum_a sum_k w_ak BCE(p_S, p_T),   w_ak = |p_T - p_S|
        box  factor / P sum_a max_k w_ak (1 - GIoU(b_S, b_T))

    Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object
    Detection", ICCV 2023. p = sigmoid(z) of the classes k at the anchors a, boxes b in pixels, and
    P as in `kd`. z is (M, A, K) and b (M, A, 4) at each of the levels, which are added. The weight
    has a gradient in the first part only.

    As in the authors' code the box part takes GIoU, where the paper says IoU. It is not as in that
    code that a level without ground truth costs nothing: P is of all levels. Images without labels
    take no part.

    Args:
        weight (float): lambda.
        cls, box (float): factors of the two parts.

    Raises:
        ConfigError: an option is out of its range.
    """

    compares = ("dense",)

    def __init__(
        self,
        weight: float = 1.0,
        cls: float = 1.0,  # [authors], as is the next one
        box: float = 4.0,
    ) -> None:
        super().__init__(weight)
        check_factors(cls=cls, box=box)
        self.cls, self.box = float(cls), float(box)

    def forward(
        self, student: Predictions, teacher: Predictions, context: Context
    ) -> Dict[str, Tensor]:
        """The parts, "cls" and "box" -> scalar >= 0."""
        scores, boxes = [], []
        for level, s in student["dense"].items():
            t = teacher["dense"][level]
            apart = (t.logits.sigmoid() - s.logits.sigmoid()).abs()  # (M, A, K)
            scores.append((apart * binary_cross_entropy(s.logits, t.logits)).sum())
            boxes.append((apart.detach().amax(dim=2) * giou_cost(s.boxes, t.boxes)).sum())
        parts = {"cls": self.cls * torch.stack(scores), "box": self.box * torch.stack(boxes)}
        return {name: values.sum() / s.positives for name, values in parts.items()}
