"""DKD: the class of a proposal and the others are weighed apart (Zhao et al., CVPR 2022)."""

from typing import Dict

import torch
from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_factors, check_positive

from .base import KDLoss
from .context import Context
from .predictions import Predictions, by_stage


@register_loss("dkd")
class DKDLoss(KDLoss):
    """Two divergences of a box head's predictions for R proposals.

        target  alpha tau^2 / R sum_r KL(t_T || t_S)
        other   beta tau^2 / R sum_r KL(q_T || q_S)

    Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022. With p = softmax(z / tau), student
    S, teacher T, and y the class that the student's own loss gives to the proposal, which may be
    the background: t = (p_y, 1 - p_y), and q is the softmax over all classes but y. z is
    (R, K + 1). With alpha 1 and 1 - p_y of the teacher in place of beta the sum is the divergence
    of `kd`. A box head of several stages has a value for each, such as target_stage1. The ground
    truth is needed: images without labels take no part.

    The logarithm of 1 - p_y is computed from the logits. The authors take it of a sum of
    probabilities, which is infinite where they are sharp.

    Args:
        weight (float): lambda.
        alpha, beta (float): factors of the two parts.
        temperature (float): tau.

    Raises:
        ConfigError: an option is out of its range.
    """

    compares = ("roi",)

    def __init__(
        self,
        weight: float = 1.0,  # [authors], of the detectors, as are the next three
        alpha: float = 1.0,
        beta: float = 0.25,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_factors(alpha=alpha, beta=beta)
        check_positive(temperature=temperature)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(
        self, student: Predictions, teacher: Predictions, context: Context
    ) -> Dict[str, Tensor]:
        """Part -> scalar >= 0."""
        targets = context.require_targets("dkd")
        parts = {}
        for stage, s, t in by_stage(student, teacher):
            scale = self.temperature**2 / max(len(s.logits), 1)
            logits = s.logits / self.temperature, t.logits / self.temperature
            target, other = decoupled_kl(*logits, s.labels(targets))
            parts[f"target{stage}"] = self.alpha * scale * target.sum()
            parts[f"other{stage}"] = self.beta * scale * other.sum()
        return parts


def decoupled_kl(student: Tensor, teacher: Tensor, labels: Tensor):
    """KL(b_T || b_S) and KL(q_T || q_S), (R,) each, of logits (R, K + 1) and classes (R,)."""
    own = torch.zeros_like(student, dtype=torch.bool).scatter_(1, labels[:, None], True)

    def log_probabilities(logits: Tensor):
        others = logits.masked_fill(own, float("-inf")).logsumexp(dim=1, keepdim=True)
        total = logits.logsumexp(dim=1, keepdim=True)
        pair = torch.cat([logits.gather(1, labels[:, None]), others], dim=1) - total
        return pair, (logits - others).masked_fill(own, 0)  # (R, 2), (R, K + 1)

    pair_s, rest_s = log_probabilities(student)
    pair_t, rest_t = log_probabilities(teacher)
    target = (pair_t.exp() * (pair_t - pair_s)).sum(dim=1)
    return target, (rest_t.exp() * (rest_t - rest_s)).sum(dim=1)  # the own class adds 1 * 0
