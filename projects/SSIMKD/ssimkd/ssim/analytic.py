"""The kernel of `one_pass.py` in torch operators, for any device.

With v = x - y, u = x + y, mu the mean and V the variance under the window B, the luminance l and
the product cs of contrast and structure are

    j = mu_v^2 / (mu_u^2 + mu_v^2 + 2 C1)      l = 1 - 2 j
    k = V_v / (V_u + V_v + 2 C2)               cs = 1 - 2 k          1 - l cs = 2 (j + k l)

and with primes for maps about their level, which spares V its rounding,

    t = l / (V_u + V_v + 2 C2)      f = (2 j mu_x - mu_v) / (mu_u^2 + mu_v^2 + 2 C1)
    d sum(1 - l cs) / dx = -4 { B^T[cs f + t (mu_v' - 2 k mu_x')] + 2 x' B^T[k t] - v' B^T[t] }

B and its adjoint B^T are products with a banded matrix along each axis (`window.py`). On a CPU they
are cut into blocks, which leaves out most zeros, and maps are taken a few at a time, as many as a
core's cache holds. They lie in stacks (h, S, k, w), S statistics of each of k maps: so both
products are plain ones of large matrices.
"""

import math
from functools import lru_cache
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor

from .window import window_matrices

# Cells taken at a time
CHUNKS = {"cpu": 140_000, "cuda": 2**25}
# Rows and columns of a block: longer ones meet more of the matrix's zeros, 16 columns go fastest
BLOCKS = (20, 16)


def covers(student: Tensor, teacher: Tensor, options: Dict[str, Any]) -> bool:
    """Whether :func:`kernel` supports such maps and options."""
    # With border "zero" a map about its level would have another border
    return options["border"] != "zero" and options["exponents"] == (1, 1, 1)


def kernel(
    x: Tensor,
    y: Tensor,
    affine: Tensor,
    options: Dict[str, Any],
    gradient: Optional[Tensor],
    factor: float,
) -> Tensor:
    """See the head of `one_pass.py`; float64 if `affine` is."""
    (maps, height, width), device, dtype = x.shape, x.device, affine.dtype
    window = tuple(options[k] for k in ("window_size", "sigma", "border"))
    blur, adjoint = _windows(height, width, *window, str(device), dtype)
    constants = [2 * (options[k] * options["data_range"]) ** 2 for k in ("k1", "k2")]
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    cells = CHUNKS.get(device.type, CHUNKS["cuda"]) * threads
    step = min(maps, max(1, cells // (height * width)))
    # Allocated once: touching fresh memory takes as long as the arithmetic
    buffers = [affine.new_empty(4 * step * height * width) for _ in range(4)]
    sums = affine.new_zeros(3, maps)
    for part in (slice(start, start + step) for start in range(0, maps, step)):
        # (k, width): the same in each cell of a row, so that rows of all maps are one long loop
        numbers = affine[:, part, None].expand(-1, -1, width).contiguous()
        level_x, scale_x, shift_x, level_y, scale_y, shift_y = numbers
        stack = _view(buffers[0], height, 4, len(level_x), width)
        a, v, uu, vv = stack.unbind(1)
        torch.sub(x[part].transpose(0, 1), level_x, out=a).mul_(scale_x)
        torch.sub(y[part].transpose(0, 1), level_y, out=v).mul_(scale_y)
        torch.add(a, v, out=uu)
        uu.mul_(uu)
        torch.sub(a, v, out=v)
        torch.mul(v, v, out=vv)
        means = blur(stack, *buffers[1:3])
        rows, _, k, columns = means.shape
        spare, slopes = (_view(buffers[i], rows, s, k, columns) for i, s in ((1, 4), (3, 3)))
        shifts = shift_x[:, :columns], (shift_x - shift_y)[:, :columns]
        dissimilarity = _compare(means, shifts, constants, spare, slopes, gradient is not None)
        sums[0, part] = dissimilarity.sum((0, 2)).mul_(2 / (rows * columns))
        if gradient is None:
            continue
        d_mean, d_uu, d_vv = adjoint(slopes, *buffers[1:3]).unbind(1)
        slope = d_mean.addcmul_(d_uu, a, value=2).addcmul_(d_vv, v, value=-1)
        sums[1, part] = slope.sum((0, 2))
        sums[2, part] = a.mul_(slope).sum((0, 2))
        weight = affine[1, part, None, None] * (-4 * factor / (rows * columns))
        torch.mul(slope.transpose(0, 1), weight, out=gradient[part])
        sums[1:, part] *= -4 / (rows * columns)
    return sums


def _compare(means, shifts, constants, spare, slopes, with_slopes):
    """(1 - SSIM) / 2 from the means of a stack, which it overwrites; fills the slopes."""
    (shift_x, shift_v), (twice_c1, twice_c2) = shifts, constants
    x, v, var, var_v = means.unbind(1)
    u, vv, luminance, result = spare.unbind(1)
    d_mean, d_uu, d_vv = slopes.unbind(1)
    torch.sub(v, x, alpha=2, out=u)  # less u's mean
    var.addcmul_(u, u, value=-1).clamp_min_(0)
    var_v.addcmul_(v, v, value=-1).clamp_min_(0)
    var.add_(var_v).add_(twice_c2)
    k = var_v.div_(var)
    if with_slopes:
        torch.addcmul(v, k, x, value=-2, out=d_mean)
    x += shift_x
    v += shift_v
    torch.sub(v, x, alpha=2, out=u)
    torch.mul(v, v, out=vv)
    power = u.mul_(u).add_(vv).add_(twice_c1)
    j = vv.div_(power)
    torch.mul(j, -2, out=luminance).add_(1)
    torch.addcmul(j, k, luminance, out=result)
    if with_slopes:
        f = v.addcmul_(j, x, value=-2).div_(power)  # -f
        torch.div(luminance, var, out=d_vv)
        torch.mul(k, d_vv, out=d_uu)
        d_mean.mul_(d_vv).addcmul_(f, k.mul_(2).sub_(1))
    return result


def _view(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


class _Blur:
    """A product with a banded matrix along each axis of a stack (h, S, k, w)."""

    def __init__(self, matrices: List[Tensor], blocks: Tuple[int, ...], like: Tensor) -> None:
        self.size = [len(m) for m in matrices]
        self.rows, self.columns = (
            [(out, seen, weights.to(like).contiguous()) for out, seen, weights in _blocks(m, n)]
            for m, n in zip(matrices, blocks)
        )

    def __call__(self, stack: Tensor, down: Tensor, across: Tensor) -> Tensor:
        """Fills the two buffers; the result, (H, S, k, W), is a view of the second one."""
        (height, width), (_, s, k, cells) = self.size, stack.shape
        stack, down = stack.flatten(1), _view(down, height, s * k * cells)
        for out, seen, weights in self.rows:
            torch.mm(weights, stack[seen], out=down[out])
        down, across = down.view(-1, cells), _view(across, height * s * k, width)
        for out, seen, weights in self.columns:
            torch.mm(down[:, seen], weights.t(), out=across[:, out])
        return across.view(height, s, k, width)


def _blocks(matrix: Tensor, length: int) -> Iterator[Tuple[slice, slice, Tensor]]:
    """Cuts a banded matrix: rows, the columns that they are not 0 in, and what is there.

    All blocks are of one length, so that the last one may do some of its neighbour's rows again.
    """
    length = length if len(matrix) >= 2 * length else len(matrix)
    for start in range(0, len(matrix), length):
        first = min(start, len(matrix) - length)
        block = matrix[first : first + length]
        seen = block.any(0).nonzero()
        columns = slice(int(seen[0]), int(seen[-1]) + 1)
        yield slice(first, first + length), columns, block[:, columns]


@lru_cache(maxsize=128)
def _windows(height, width, window_size, sigma, border, device, dtype) -> Tuple[_Blur, _Blur]:
    """B and its adjoint."""
    matrices = window_matrices(height, width, window_size, sigma, border)
    blocks = BLOCKS if device == "cpu" else (height + width,) * 2  # a GPU needs few launches
    like = torch.empty(0, dtype=dtype, device=device)
    return _Blur(matrices, blocks, like), _Blur([m.t() for m in matrices], blocks, like)
