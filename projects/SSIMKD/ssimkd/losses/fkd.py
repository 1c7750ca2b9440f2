"""FKD: attention-guided and non-local distillation (Zhang & Ma, ICLR 2021)."""

from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_factors, check_positive, check_switches

from .attention import channel_attention, spatial_attention
from .base import KDLoss, Maps, in_float
from .context import Context


class NonLocal(nn.Module):
    """F + BN(W y), where y_i is the mean over pooled cells j of (query_i . key_j) value_j.

    The dot-product block of Wang et al. (CVPR 2018) with max-pooled keys and values. Scale and
    shift of BN start at 0, so that the block starts as the identity.

    Args:
        channels (int): C. Queries, keys and values have C / 4 channels if `pool_size` is above 2,
            and C / 2 otherwise [authors].
        pool_size (int): cells per side of a pooling window. A smaller map is one window.
    """

    def __init__(self, channels: int, pool_size: int) -> None:
        super().__init__()
        hidden = max(channels // (4 if pool_size > 2 else 2), 1)
        self.pool_size = pool_size
        self.query, self.key, self.value = (nn.Conv2d(channels, hidden, 1) for _ in range(3))
        self.out = nn.Linear(hidden, channels, bias=False)  # BN would cancel a bias
        self.scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, stacks: List[Tensor]) -> Tensor:
        """Stacks of maps (n, C, h, w) of several sizes -> (cells of all images, C)."""
        related = self.out(by_cell([self.relate(x) for x in stacks]))
        # BN over the cells of the images, without padding. layer_norm accepts a single cell
        normal = F.layer_norm(related.t(), related.shape[:1]).t()
        return by_cell(stacks) + normal * self.scale + self.shift

    def relate(self, maps: Tensor) -> Tensor:
        """y of (n, C, h, w) maps: (n, hidden, h, w)."""
        h, w = maps.shape[-2:]
        window = (min(self.pool_size, h), min(self.pool_size, w))
        key = F.max_pool2d(self.key(maps), window).flatten(2)  # (n, hidden, windows)
        value = F.max_pool2d(self.value(maps), window).flatten(2)
        # The product of values and keys is taken first: it is (hidden, hidden), and that of keys
        # and queries would be (windows, cells)
        relation = value @ key.transpose(1, 2) / key.shape[2]
        return (relation @ self.query(maps).flatten(2)).unflatten(2, (h, w))


def by_cell(stacks: List[Tensor]) -> Tensor:
    """Stacks of maps (n, C, h, w) of several sizes as one (cells, C)."""
    return torch.cat([x.movedim(1, 3).flatten(0, 2) for x in stacks])


@register_loss("fkd")
class FKDLoss(KDLoss):
    """Distances of maps, of their means and of their relations, per level.

        feature |sqrt(A) (T - f(S))| + channel |mean_hw T - g(mean_hw S)|
        + spatial |mean_c T - h(mean_c S)| + non_local |R_T(T) - r(R_S(S))|

    Zhang & Ma, "Improve Object Detection with Feature-based Knowledge Distillation", ICLR 2021.
    |.| is the Euclidean norm over the whole batch, as in the authors' code: it grows with the root
    of the number of images. A is the mean of both maps' spatial attention, without gradient. f and
    r are conv1x1, g is linear, h is conv3x3, R_S and R_T are :class:`NonLocal`. All of them are
    trained, therefore equal maps cost something until these agree.

    The paper, and the authors' code for one-stage detectors, multiply A by the channel attention;
    their code for two-stage detectors does not. Where paper and code differ in a number (issue 5 of
    the authors' repository), the default is the code's. The code was read in copies of its
    OpenReview supplement.

    Args:
        weight (float): factor of the whole loss.
        temperature (float): of the attention, > 0.
        feature, channel, spatial, non_local (float): the factors of the formula.
        channel_attention (bool): whether A contains the channel attention.
        pool_sizes (sequence[int]): of :class:`NonLocal`, one per level in the order of IN_FEATURES;
            the last one is for all further levels.
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
        check_factors(feature=feature, channel=channel, spatial=spatial, non_local=non_local)
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
            parts = dict(
                feature=nn.Conv2d(width, width, 1),
                channel=nn.Linear(width, width),
                spatial=nn.Conv2d(1, 1, 3, padding=1),
                student=NonLocal(width, pool_size),
                teacher=NonLocal(width, pool_size),
                relation=nn.Linear(width, width),  # a conv1x1, on (cells, C)
            )
            self.parts[level] = nn.ModuleDict(parts)

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """Level -> scalar >= 0."""
        student, teacher = in_float(student, teacher)
        losses = {}
        for level in student:
            crops = context.crops(level, student[level], teacher[level])
            losses[level] = self.compare(level, [(s, t) for (s, t), _ in crops])
        return losses

    def compare(self, level: str, pairs: List[Tuple[Tensor, Tensor]]) -> Tensor:
        """Scalar for pairs of (n, C, h, w) maps; each pair holds the images of one size."""
        parts: Dict[str, nn.Module] = dict(self.parts[level].named_children())
        gaps: List[List[Tensor]] = [
            [self.root_attention(s, t) * (t - parts["feature"](s)) for s, t in pairs],
            [t.mean((2, 3)) - parts["channel"](s.mean((2, 3))) for s, t in pairs],
            [t.mean(1, keepdim=True) - parts["spatial"](s.mean(1, keepdim=True)) for s, t in pairs],
        ]
        related = parts["student"]([s for s, _ in pairs])
        gaps.append([parts["teacher"]([t for _, t in pairs]) - parts["relation"](related)])
        # At 0, vector_norm has the gradient 0; the root of a sum of squares has none
        norms = [torch.linalg.vector_norm(torch.cat([x.flatten() for x in gap])) for gap in gaps]
        return torch.stack([c * norm for c, norm in zip(self.coefficients, norms)]).sum()

    @torch.no_grad()
    def root_attention(self, student: Tensor, teacher: Tensor) -> Tensor:
        """sqrt(A) of (n, C, h, w) maps: (n, 1, h, w), or (n, C, h, w) with channel attention."""
        s, t = (spatial_attention(x, self.temperature) for x in (student, teacher))
        attention = (s + t) / 2
        if self.channel_attention:
            s, t = (channel_attention(x, self.temperature) for x in (student, teacher))
            attention = attention * (s + t) / 2
        return attention.sqrt()
