"""Attention-guided and non-local distillation (Zhang & Ma, ICLR 2021)."""

from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_coefficients, check_positive, check_switches

from .attention import channel_attention, spatial_attention
from .base import Context, KDLoss, Maps
from .blocks import NonLocal


@register_loss("fkd")
class FKDLoss(KDLoss):
    """Distances of maps, of their means and of their relations, per level.

        feature |sqrt(A) (T - f(S))| + channel |mean_hw T - g(mean_hw S)|
        + spatial |mean_c T - h(mean_c S)| + non_local |R_T(T) - r(R_S(S))|

    |.|: the Euclidean norm over the whole batch, as the authors have it: it grows with the root of
    the number of images, and images share one square root. A: the mean of both maps' spatial
    attention, without gradient. f, r: conv1x1, g: linear, h: conv3x3; R_S, R_T: :class:`NonLocal`;
    all are trained, so that equal maps cost something until they agree. The paper and the code
    for one-stage detectors multiply A by the channel attention, the code for two-stage ones does
    not: `channel_attention`. Where paper and code differ in a number (issue 5 of the authors'
    repository), the code's is the default; it was read in copies of its OpenReview supplement.

    Args:
        weight (float): of the whole.
        temperature (float): of the attention, > 0.
        feature, channel, spatial, non_local (float): see above.
        channel_attention (bool): see above.
        pool_sizes (sequence[int]): of :class:`NonLocal`, by level; the last for all further levels.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        # [authors: their code for two-stage detectors; in brackets, for one-stage detectors]
        weight: float = 1.0,
        temperature: float = 0.5,  # (0.1); the paper has these two the other way round
        feature: float = 7e-5,  # (4.2e-4)
        channel: float = 4e-3,  # (2.4e-2)
        spatial: float = 4e-3,  # (2.4e-2)
        non_local: float = 7e-5,  # (4.2e-4)
        channel_attention: bool = False,  # (True), as in the paper
        pool_sizes: Sequence[int] = (8, 4, 2),
    ) -> None:
        super().__init__(weight)
        check_positive(temperature=temperature)
        check_coefficients(feature=feature, channel=channel, spatial=spatial, non_local=non_local)
        check_switches(channel_attention=channel_attention)
        if not pool_sizes or not all(isinstance(n, int) and n > 0 for n in pool_sizes):
            raise ValueError(f"pool_sizes must be positive integers, got {pool_sizes!r}")
        self.temperature, self.channel_attention = temperature, channel_attention
        self.coefficients = (feature, channel, spatial, non_local)
        self.pool_sizes = tuple(pool_sizes)
        self.parts = nn.ModuleDict()

    def attach(self, channels: Dict[str, int], num_classes: int) -> None:
        """Makes f, g, h, r, R_S and R_T, one of each per level."""
        for index, (level, width) in enumerate(channels.items()):
            pool_size = self.pool_sizes[min(index, len(self.pool_sizes) - 1)]
            self.parts[level] = nn.ModuleDict(
                dict(
                    feature=nn.Conv2d(width, width, 1),
                    channel=nn.Linear(width, width),
                    spatial=nn.Conv2d(1, 1, 3, padding=1),
                    student=NonLocal(width, pool_size),
                    teacher=NonLocal(width, pool_size),
                    relation=nn.Linear(width, width),  # conv1x1 of maps laid out by cells
                )
            )

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """See the head of `base.py`."""
        losses = {}
        for level in student:
            crops = context.crops(level, student[level], teacher[level])
            losses[level] = self.compare(level, [(s, t) for (s, t), _ in crops])
        return losses

    def compare(self, level: str, pairs: List[Tuple[Tensor, Tensor]]) -> Tensor:
        """Scalar for pairs of (n, C, h, w) maps, each of images of one size."""
        parts: Dict[str, nn.Module] = dict(self.parts[level].named_children())
        gaps: List[List[Tensor]] = [
            [self._root_attention(s, t) * (t - parts["feature"](s)) for s, t in pairs],
            [t.mean((2, 3)) - parts["channel"](s.mean((2, 3))) for s, t in pairs],
            [t.mean(1, keepdim=True) - parts["spatial"](s.mean(1, keepdim=True)) for s, t in pairs],
        ]
        related = parts["student"]([s for s, _ in pairs])
        gaps.append([parts["teacher"]([t for _, t in pairs]) - parts["relation"](related)])
        # vector_norm has slope 0 where all is 0; the root of a sum of squares has none
        norms = [torch.linalg.vector_norm(torch.cat([x.flatten() for x in gap])) for gap in gaps]
        return torch.stack([c * norm for c, norm in zip(self.coefficients, norms)]).sum()

    @torch.no_grad()
    def _root_attention(self, student: Tensor, teacher: Tensor) -> Tensor:
        kinds = [spatial_attention, channel_attention][: 2 if self.channel_attention else 1]
        attention = torch.ones_like(student[:, :1])
        for kind in kinds:
            both = kind(student, self.temperature) + kind(teacher, self.temperature)
            attention = attention * both / 2
        return attention.sqrt()
