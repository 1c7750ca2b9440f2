"""CrossKD: a student's features go through its teacher's head (Wang et al., CVPR 2024)."""

from typing import Dict

import torch
from torch import Tensor

from ssimkd.errors import ConfigError
from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_coefficients, check_factors, check_integers

from .base import KDLoss
from .context import Context
from .predictions import Predictions, binary_cross_entropy, giou_cost


@register_loss("crosskd")
class CrossKDLoss(KDLoss):
    """Distance of the teacher's predictions on its own features and on the student's.

        cls  factor / P sum_a sum_k |p_X - p_T|^exponent BCE(p_X, p_T)
        box  factor / P sum_a max_k p_T (1 - GIoU(b_X, b_T))

    Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024. The
    subnets of a dense head have n convolutions. The student's features behind number `layer` of
    them go through the teacher's later ones, which are frozen, and give the predictions X: class
    probabilities p = sigmoid(z) at the anchors a, boxes b in pixels. So the student's own later
    convolutions learn from the ground truth alone. z is (M, A, K) and b (M, A, 4) at each of the
    levels, which are added. The first part is the quality focal loss with p_T as label.

    The paper does not say what its sums over the whole map are divided by: here it is P as in `kd`,
    and the boxes of an anchor count as much as the teacher sees an object there, since there are
    many more anchors than objects. FCOS's centerness and images without labels take no part.

    Args:
        weight (float): lambda.
        layer (int): 1 to n.
        exponent (float): >= 1.
        cls, box (float): factors of the two parts.

    Raises:
        ConfigError: an option is out of its range.
    """

    compares = ("dense", "cross")

    def __init__(
        self,
        weight: float = 1.0,  # [paper], as are the next one and the factors
        layer: int = 3,
        exponent: float = 2.0,  # of the quality focal loss's own authors
        cls: float = 1.0,
        box: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_integers(1, layer=layer)
        check_factors(cls=cls, box=box)
        check_coefficients(exponent=exponent)
        if exponent < 1:
            raise ConfigError(f"exponent must be at least 1, got {exponent!r}")
        self.layer, self.exponent = layer, float(exponent)
        self.cls, self.box = float(cls), float(box)

    def forward(
        self, student: Predictions, teacher: Predictions, context: Context
    ) -> Dict[str, Tensor]:
        """The parts, "cls" and "box" -> scalar >= 0."""
        scores, boxes = [], []
        for level, x in student["cross"].items():
            t = teacher["dense"][level]
            apart = (t.logits.sigmoid() - x.logits.sigmoid()).abs().pow(self.exponent)
            scores.append((apart * binary_cross_entropy(x.logits, t.logits)).sum())
            boxes.append((t.scores() * giou_cost(x.boxes, t.boxes)).sum())
        parts = {"cls": self.cls * torch.stack(scores), "box": self.box * torch.stack(boxes)}
        return {name: values.sum() / x.positives for name, values in parts.items()}
