"""MGD: the teacher's map is generated from a part of the student's (Yang et al., ECCV 2022)."""

from functools import partial
from typing import Dict

import torch
from torch import Tensor, nn

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_positive

from .base import KDLoss, Maps, in_float
from .context import Context


@register_loss("mgd")
class MGDLoss(KDLoss):
    """generation sum (G(M S) - T)^2 per level, averaged over images.

    Yang et al., "Masked Generative Distillation", ECCV 2022. The mask M hides each cell, in all of
    its channels, with the probability `mask_ratio`. The generator G is conv3x3, ReLU, conv3x3. It
    is trained with the student and is not part of the detector afterwards. G starts with random
    weights, therefore equal maps cost something at first. The loss agrees with the authors' code
    (github.com/yzd-v/MGD). Their configs for one-stage detectors also start from the teacher's
    neck and head, see MODEL.DISTILL.INHERIT.

    Args:
        weight (float): factor of the whole loss.
        generation (float): the paper's alpha, for a sum over elements.
        mask_ratio (float): the paper's lambda, in [0, 1).
    """

    def __init__(
        self,
        # [authors: for Faster and Mask R-CNN; in brackets for RetinaNet and RepPoints]
        weight: float = 1.0,
        generation: float = 5e-7,  # (2e-5)
        mask_ratio: float = 0.45,  # (0.65)
    ) -> None:
        super().__init__(weight)
        check_positive(generation=generation)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio!r}")
        self.generation, self.mask_ratio = generation, mask_ratio
        self.generators = nn.ModuleDict()

    def attach(self, channels: Dict[str, int], num_classes: int) -> None:
        """Makes one generator per level."""
        for level, width in channels.items():
            self.generators[level] = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """Level -> scalar >= 0. The mask is drawn by torch's generator on the maps' device."""
        student, teacher = in_float(student, teacher)
        losses = {}
        for level, s in student.items():
            n, _, h, w = s.shape
            # drawn for the padding too, so that image sizes do not change the number of draws
            kept = torch.rand((n, 1, h, w), device=s.device) >= self.mask_ratio
            compare = partial(self.compare, level)
            losses[level] = context.mean(level, compare, s * kept, teacher[level])
        return losses

    def compare(self, level: str, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over n images of (n, C, h, w) maps; the student's are masked already."""
        error = (self.generators[level](student) - teacher).square().sum()
        return self.generation * error / len(student)
