"""The Gaussian window of SSIM: the average B under it, and the same as a matrix along each axis."""

from functools import lru_cache
from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor

BORDERS = ("renormalize", "reflect", "valid", "zero")


class Window:
    """The window average B of maps of one size, as two one-dimensional filters per channel."""

    def __init__(self, size, window_size: int, sigma: float, border: str, like: Tensor):
        """`size` is the maps' (H, W); the weights take `like`'s device and dtype."""
        limit = {"reflect": [n - 1 for n in size], "valid": [(n - 1) // 2 for n in size]}
        radii = [min(window_size // 2, r) for r in limit.get(border, [window_size // 2] * 2)]
        self.border, self.radii = border, radii
        self.weights = [gaussian(radius, sigma, like) for radius in radii]
        self.inside = None  # share of each window that lies inside the map, (H, W)
        if border == "renormalize":
            rows, columns = (_coverage(n, w) for n, w in zip(size, self.weights))
            self.inside = rows[:, None] * columns

    def pad(self, x: Tensor) -> Tensor:
        """What the border adds around a map, (N, C, H, W) -> (N, C, H + 2 ry, W + 2 rx)."""
        (ry, rx), modes = self.radii, {"reflect": "reflect", "zero": "constant"}
        return F.pad(x, (rx, rx, ry, ry), modes[self.border]) if self.border in modes else x

    def average(self, x: Tensor) -> Tensor:
        """B[x] of a padded map, (N, C, ., .) -> (N, C, H, W), or smaller with border "valid"."""
        filtered = self._filter(x)
        return filtered if self.inside is None else filtered / self.inside

    def _filter(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        ry, rx = self.radii if self.border == "renormalize" else (0, 0)
        down = self.weights[0].view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        across = self.weights[1].view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        x = F.conv2d(x, down, padding=(ry, 0), groups=channels)
        return F.conv2d(x, across, padding=(0, rx), groups=channels)


def gaussian(radius: int, sigma: float, like: Tensor) -> Tensor:
    """Gaussian weights of 2 radius + 1 cells that sum to 1."""
    cells = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    weights = torch.exp(-(cells**2) / (2 * sigma**2))
    return weights / weights.sum()


def _coverage(size: int, weights: Tensor) -> Tensor:
    """Sum of the weights inside a line of cells, the window centred on each of them, (size,)."""
    radius = len(weights) // 2
    cells = torch.arange(size, device=weights.device)
    seen = cells[:, None] + torch.arange(-radius, radius + 1, device=weights.device)
    return (weights * ((seen >= 0) & (seen < size))).sum(dim=1)


@lru_cache(maxsize=128)  # the sizes of the maps of a few dozen image sizes
def window_matrices(
    height: int, width: int, window_size: int, sigma: float, border: str
) -> List[Tensor]:
    """B along the columns and along the rows of maps of one size.

    Returns:
        list[Tensor]: two banded matrices in float64 on the CPU, (cells of the result, cells of the
        map) each. B[x] is `down @ x @ across.T`, and the adjoint of B is `down.T @ x @ across`.
    """
    like = torch.empty(0, dtype=torch.float64, device="cpu")
    window = Window((height, width), window_size, sigma, border, like)
    return [_matrix(n, w, border) for n, w in zip((height, width), window.weights)]


def _matrix(size: int, weights: Tensor, border: str) -> Tensor:
    radius = 0 if border == "valid" else len(weights) // 2
    mode = "reflect" if border == "reflect" else "constant"
    impulses = torch.eye(size, dtype=weights.dtype, device=weights.device)[:, None]
    impulses = F.pad(impulses, (radius, radius), mode)
    matrix = F.conv1d(impulses, weights[None, None])[:, 0].t()
    return matrix / matrix.sum(1, keepdim=True) if border == "renormalize" else matrix
