"""Trainable blocks that relate the cells of a map, for FKD and FGD; each starts as the identity."""

from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContextBlock(nn.Module):
    """F + what its attention-pooled vector adds to each channel (GCNet, Cao et al., ICCVW 2019).

    The last layer starts at 0.
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
        """(n, C, h, w), of the maps' shape."""
        attention = self.attention(maps).flatten(2).softmax(dim=2)  # (n, 1, h w)
        pooled = (maps.flatten(2) * attention).sum(dim=2)  # (n, C)
        return maps + self.add(pooled)[:, :, None, None]


class NonLocal(nn.Module):
    """F + BN(W y), y_i = mean over pooled cells j of (query_i . key_j) value_j.

    The dot-product block of Wang et al. (CVPR 2018) with max-pooled keys and values; BN's scale
    and shift start at 0.

    Args:
        channels (int): C; inside, C / 4 under windows larger than 2 and C / 2 else (authors).
        pool_size (int): cells per side of a window; a smaller map is one window.
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
        """(cells of all images, C) for stacks of maps (n, C, h, w)."""
        related = self.out(by_cell([self._relate(x) for x in stacks]))
        # BN of a training batch, over the cells of the images alone; one cell is no error
        normal = F.layer_norm(related.t(), related.shape[:1]).t()
        return by_cell(stacks) + normal * self.scale + self.shift

    def _relate(self, maps: Tensor) -> Tensor:
        h, w = maps.shape[-2:]
        window = (min(self.pool_size, h), min(self.pool_size, w))
        key = F.max_pool2d(self.key(maps), window).flatten(2)  # (n, hidden, windows)
        value = F.max_pool2d(self.value(maps), window).flatten(2)
        # values x keys first: (hidden, hidden) instead of (cells, windows), the same product
        relation = value @ key.transpose(1, 2) / key.shape[2]
        return (relation @ self.query(maps).flatten(2)).unflatten(2, (h, w))


def by_cell(stacks: List[Tensor]) -> Tensor:
    """Maps (n, C, h, w) of several sizes as one (cells, C)."""
    return torch.cat([x.movedim(1, 3).flatten(0, 2) for x in stacks])
