"""DIST: correlation of class probabilities between and within classes (Huang et al., 2022)."""

from typing import Dict

import torch
from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_factors

from .base import KDLoss
from .context import Context
from .predictions import Predictions, by_stage


@register_loss("dist")
class DISTLoss(KDLoss):
    """1 - r of the class probabilities, along the classes and along the places.

        inter  beta mean over rows (1 - r),   intra  gamma mean over columns (1 - r)

    r is the Pearson correlation of the student's and the teacher's row or column. Huang et al.,
    "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022. Of a box head the table is
    softmax(z), (R, K + 1): a row is a proposal, a column a class or the background. Of a dense head
    it is sigmoid(z), (cells, A K), one table per level, and the levels are added. Stages of a box
    head are added as well. The places of a column are those of the whole batch, in which images
    without labels take no part.

    Of a row or column that is constant, which the rounding would decide, r is not defined: it costs
    1/2 where one of the two is constant and 0 where both are. The authors add 1e-8 to the norms'
    product in place of that, so that small probabilities cost up to 1 even between equal tables.

    Args:
        weight (float): lambda.
        beta, gamma (float): factors of the two parts.

    Raises:
        ConfigError: an option is out of its range.
    """

    compares = ("roi", "dense")

    def __init__(
        self,
        weight: float = 1.0,  # [authors], of the detectors, as are the next two
        beta: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_factors(beta=beta, gamma=gamma)
        self.beta, self.gamma = float(beta), float(gamma)

    def forward(
        self, student: Predictions, teacher: Predictions, context: Context
    ) -> Dict[str, Tensor]:
        """Part -> scalar, such as roi_inter and dense_intra."""
        tables = [
            ("roi", s.logits.softmax(dim=1), t.logits.softmax(dim=1))
            for _, s, t in by_stage(student, teacher)
        ]
        tables += [
            (
                "dense",
                s.logits.sigmoid().flatten(1),
                teacher["dense"][level].logits.sigmoid().flatten(1),
            )
            for level, s in student.get("dense", {}).items()
        ]
        parts: Dict[str, Tensor] = {}
        for kind, s, t in tables:
            for part, factor, dim in (("inter", self.beta, 1), ("intra", self.gamma, 0)):
                costs = correlation_cost(s, t, dim)
                name = f"{kind}_{part}"
                parts[name] = parts.get(name, 0) + factor * costs.sum() / max(len(costs), 1)
        return parts


def correlation_cost(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """1 - r along a dimension of two tables (rows, columns), as half the squared distance."""
    difference = standardize(student, dim) - standardize(teacher, dim)
    return difference.square().sum(dim=dim) / 2


def standardize(table: Tensor, dim: int) -> Tensor:
    """The table less its mean, with norm 1 along a dimension; about 0 where it is constant."""
    centred = table - table.mean(dim=dim, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    rounding = 1e-4 * torch.linalg.vector_norm(table.detach(), dim=dim, keepdim=True)
    least = torch.finfo(table.dtype).tiny ** 0.5  # squares of smaller numbers lose their digits
    return centred / norm.maximum(rounding).clamp(min=least)
