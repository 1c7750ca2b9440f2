"""The SSIM loss of normalised maps on a CPU, its gradient formed in the forward.

Equal to `normalize.py`, `Context.crops` and :func:`ssimkd.ssim.ssim_loss` one after the other,
which define it, in a fraction of their time and memory. With v = x - y, u = x + y, mu the mean and
V the variance under the window, the luminance l and the product cs of contrast and structure are

    j = mu_v^2 / (mu_u^2 + mu_v^2 + 2 C1)      l = 1 - 2 j
    k = V_v / (V_u + V_v + 2 C2)               cs = 1 - 2 k

and with primes for maps that are shifted to be near 0, which spares V its rounding,

    t = l / (V_u + V_v + 2 C2)      f = (2 j mu_x - mu_v) / (mu_u^2 + mu_v^2 + 2 C1)
    d sum(l cs) / dx = 4 { B^T[cs f + t (mu_v' - 2 k mu_x')] + 2 x' B^T[k t] - v' B^T[t] }

where B is the average under the window, B^T its adjoint: one banded matrix per axis, which holds
what the border does: no copies in another layout, no padding. `ssim_compiled.py` works on rows of a
map. Without it B is a product with these matrices, and maps are taken a few at a time, as many as a
core's cache holds, in stacks

    stack   S maps of each of k channels    (H, S, k, W), so that both products are plain ones
"""

import math
import threading
import weakref
from functools import lru_cache, partial
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compiled as ssim_compiled
from .definition import Window
from .normalize import AFFINE, SCOPES, TINY

CHUNK = 140_000  # cells that a thread takes at a time; a stack of four maps is then 2 MB
# Rows, columns of a product: longer ones meet more of the matrix's zeros, and 16 columns go fastest
BLOCKS = (20, 16)
# Up to this width a product across is a convolution: 0.33 and 0.45 ns per cell of rows of 21 and 42
# cells, where blocks take 0.72; 0.83 of 84 cells, where they take 0.75 (docs/performance.md)
SHORT = 48
FLOAT: Dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


def covers(
    student: Tensor,
    teacher: Tensor,
    normalize: str,
    border: str,
    exponents: Sequence[float],
    **options,
) -> bool:
    """Whether :func:`ssim_loss` holds for such maps and options."""
    return (
        student.shape == teacher.shape
        and student.dim() == 4
        and student.numel() > 0
        and student.device.type == teacher.device.type == "cpu"
        and torch.float64 not in (student.dtype, teacher.dtype)
        and not teacher.requires_grad
        and normalize in AFFINE
        and border != "zero"  # which a shift would change
        and tuple(exponents) == (1, 1, 1)
    )


def ssim_loss(
    student: Tensor,
    teacher: Tensor,
    cells: List[Tuple[int, int]],
    normalize: str,
    normalize_scope: str,
    reference: Callable[[Tensor, Tensor], Tensor],
    compiled: bool,
    **options,
) -> Tensor:
    """The mean over images of (1 - SSIM) / 2.

    Args:
        student (Tensor): (N, C, H, W), gradient flows, also through its normalisation.
        teacher (Tensor): (N, C, H, W), constant.
        cells (list[(int, int)]): height and width that each image covers of its maps.
        normalize, normalize_scope (str): see `normalize.py`.
        reference (callable): (student, teacher) -> the same loss by autograd, for a second backward
            or derivative.
        compiled (bool): by `ssim_compiled.py`, where it can be built.
        options: those of :func:`ssimkd.ssim.ssim_map`, all of them; see :func:`covers`.

    Returns:
        Tensor: scalar in [0, 1], float32.
    """
    library = ssim_compiled.library() if compiled else None
    compare = partial(_compare_compiled, library) if library else _compare
    settings = (cells, normalize, normalize_scope, compare, options)
    return _Loss.apply(student, teacher, settings, reference)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, settings, reference):
        with torch.autocast("cpu", enabled=False):
            maps, (cells, normalize, scope, *how) = (student, teacher), settings
            small = len(set(cells)) == 1 and student[0].numel() < CHUNK
            if small and scope == "channel":  # all images as one: fewer calls, of longer lists
                maps, cells = [m.flatten(0, 1)[None] for m in maps], cells[:1]
            with_gradient = ctx.needs_input_grad[0]
            value, gradient = _evaluate(*maps, cells, normalize, scope, *how, with_gradient)
            gradient = gradient.view(student.shape) if with_gradient else None
        ctx.save_for_backward(student)
        # Weak: kept until the backward, the teacher's maps would cost as much as the gradient
        ctx.gradient, ctx.teacher, ctx.reference = gradient, weakref.ref(teacher), reference
        return value

    @staticmethod
    def backward(ctx, upstream):
        (student,), twice = ctx.saved_tensors, torch.is_grad_enabled()
        gradient, ctx.gradient = ctx.gradient, None  # given away, not copied
        if gradient is not None and not twice:
            return gradient.mul_(upstream).to(student.dtype), None, None, None
        teacher = ctx.teacher()
        if teacher is None:
            raise RuntimeError("a second backward of the SSIM loss needs the teacher's maps")
        with torch.enable_grad():
            loss = ctx.reference(student, teacher)
        return *torch.autograd.grad(loss, student, upstream, create_graph=twice), None, None, None


def _evaluate(student, teacher, cells, normalize, scope, compare, options, with_gradient):
    """The loss and, where asked for, its gradient, (N, C, H, W) in float32."""
    (images, channels), dims = student.shape[:2], SCOPES[scope]
    crops_x, crops_y = (
        [m if m.stride(2) == 1 else m.contiguous() for m in (z[:, :h, :w] for z, (h, w) in pairs)]
        for pairs in (list(zip(student, cells)), list(zip(teacher, cells)))
    )
    low_y, high_y, scale_y = _range(crops_y, dims, normalize)
    low_x, high_x, scale_x = low_y, high_y, scale_y
    if normalize == "minmax":
        low_x, high_x, scale_x = _range(crops_x, dims, normalize)
    constants = tuple((options[k] * options["data_range"]) ** 2 for k in ("k1", "k2"))
    window = tuple(options[k] for k in ("window_size", "sigma", "border"))
    whole = all(size == student.shape[2:] for size in cells)
    make = torch.empty if whole else torch.zeros
    gradient = make(student.shape, **FLOAT) if with_gradient else None
    sums = torch.zeros(2, images, channels, 1, 1, **FLOAT)  # per map: slope, slope x normalised map
    value = 0.0
    for i, (x, y, size) in enumerate(zip(crops_x, crops_y, cells)):
        matrices = _matrices(*size, *window)
        # The loss's slope is that of SSIM / 4 times this
        factor = -2 / (images * channels * math.prod(len(m) for m in matrices))
        # A shift need only be near the mean: every fourth row will do
        mean_x, mean_y = (m[:, ::4].mean((1, 2), True, dtype=torch.float32) for m in (x, y))
        shift_x = (mean_x - low_x[i]) * scale_x[i]
        shift_v = shift_x - (mean_y - low_y[i]) * scale_y[i]
        affine = torch.cat((mean_x, scale_x[i], mean_y, scale_y[i], shift_x, shift_v), 2)[:, 0]
        target = None if gradient is None else gradient[i, :, : size[0], : size[1]]
        ssim, total, moment = compare(
            x, y, affine, (*size, *window), constants, target, factor, normalize == "minmax"
        )
        value -= factor / 2 * float(ssim)
        sums[0, i, :, 0, 0] = factor * total
        sums[1, i, :, 0, 0] = factor * (moment + total * shift_x[:, 0, 0])
    if gradient is not None and normalize == "minmax":
        total, moment = (s.sum(dims, keepdim=True) * scale_x for s in sums)
        # z = (x - low) / (high - low): dz / dlow = (z - 1) / width, dz / dhigh = -z / width
        _spread(gradient, crops_x, torch.amin, low_x, moment - total, dims)
        _spread(gradient, crops_x, torch.amax, high_x, -moment, dims)
    return torch.tensor((1 - value) / 2, **FLOAT), gradient


def _compare(student, teacher, affine, blur, constants, gradient, factor, with_sums):
    """The sum of SSIM of an image's maps and the sums over each of slope and slope times x'.

    `gradient`, unless None, is filled with the slope times `factor`, in units of the maps. The sums
    are asked for by `with_sums`; 0 otherwise, unless they cost nothing.
    """
    (channels, height, width), (blur, adjoint) = student.shape, _blurs(*blur)
    twice_c1, twice_c2 = (torch.tensor(2 * c, **FLOAT) for c in constants)
    chunk = CHUNK * torch.get_num_threads()
    buffers = _buffers(max(chunk, height * width))  # a chunk has one map at least
    step = max(1, chunk // (height * width))
    value, sums = 0.0, torch.zeros(2, channels, **FLOAT)
    for k in (slice(start, start + step) for start in range(0, channels, step)):
        x, y = student[k], teacher[k]
        # for each cell of a row: one long loop over the rows of all maps
        affines = affine[k].t()[..., None].expand(-1, -1, width).contiguous()
        mean_x, scale_x, mean_y, scale_y, shift_x, shift_v = affines.unbind()
        stack = _view(buffers[0], height, 4, len(x), width)
        _fill(stack, x, mean_x, scale_x, y, mean_y, scale_y, twice_c2)
        means = blur(stack, *buffers[1:3])
        rows, _, maps, columns = means.shape
        spare = _view(buffers[1], rows, 4, maps, columns)
        slopes = _view(buffers[3], rows, 3, maps, columns)
        shifts = (m[:, :columns] for m in (shift_x, shift_v))
        value += float(_similarity(means, *shifts, twice_c1, twice_c2, spare, slopes))
        if gradient is None:
            continue
        slope = adjoint(slopes, *buffers[1:3])  # of the means no more is needed
        slope = _combine(slope, stack)
        if with_sums:
            sums[0, k] = slope.sum(0).sum(1)
            sums[1, k] = (slope * stack[:, 0]).sum(0).sum(1)
        torch.mul(slope.transpose(0, 1), affine[k, 1, None, None] * factor, out=gradient[k])
    return value, *sums


def _compare_compiled(
    library, student, teacher, affine, blur, constants, gradient, factor, with_sums
):
    """:func:`_compare` by compiled code."""
    maps = student.float(), teacher.float()
    axes = _axes(*blur)
    ssim, *sums = ssim_compiled.compare(library, *maps, affine, *axes, constants, gradient, factor)
    return ssim.sum(), *sums


def _range(crops, dims, normalize):
    """Lowest and highest value of each map's group, and 1 / their distance, (N, C, 1, 1) each."""
    if normalize == "none":
        zero = torch.zeros(len(crops), len(crops[0]), 1, 1, **FLOAT)
        return zero, zero, torch.ones_like(zero)
    ends = []
    for pick in (torch.amin, torch.amax):
        end = torch.stack([pick(m, (1, 2), keepdim=True).float() for m in crops])
        ends.append(pick(end, dims, keepdim=True).expand_as(end))
    width = ends[1] - ends[0]
    return *ends, torch.where(width > TINY, 1 / width, torch.zeros_like(width))


def _spread(gradient, crops, pick, end, slope, dims):
    """Adds the slope of a minimum or maximum to the cells that have it, in equal shares."""
    hits = [(pick(m, 2) == e[:, 0]).nonzero(as_tuple=True) for m, e in zip(crops, end)]  # rows
    shares = [(m[hit] == e[hit[0], 0]).float() for m, e, hit in zip(crops, end, hits)]
    counts = torch.zeros_like(end)
    for count, hit, share in zip(counts, hits, shares):
        count[:, 0, 0].index_add_(0, hit[0], share.sum(1))
    slope = slope / counts.sum(dims, keepdim=True)
    for target, m, hit, share, s in zip(gradient, crops, hits, shares, slope):
        target[:, : m.shape[1], : m.shape[2]][hit] += share * s[hit[0], 0]


_scratch = threading.local()  # of each thread, kept for good: a few MB


def _buffers(cells):
    """Memory for a stack of four, what both steps of B make of it, and three slopes.

    New pages would cost as much as the arithmetic.
    """
    if getattr(_scratch, "cells", 0) < cells:
        with torch.inference_mode(False):  # or a later training step could not write to it
            _scratch.buffers = [torch.empty(maps * cells, **FLOAT) for maps in (4, 4, 4, 3)]
        _scratch.cells = cells
    return _scratch.buffers


def _view(buffer, *shape):
    return buffer[: math.prod(shape)].view(shape)


def _fill(stack, x, mean_x, scale_x, y, mean_y, scale_y, twice_c2):
    """Makes x', v', u'^2 + 2 C2, v'^2 of some maps, (k, h, w)."""
    a, v, uu, vv = stack.unbind(1)
    torch.sub(x.transpose(0, 1), mean_x, out=a).mul_(scale_x)
    torch.sub(y.transpose(0, 1), mean_y, out=v).mul_(scale_y)
    torch.add(a, v, out=vv)
    torch.addcmul(twice_c2, vv, vv, out=uu)
    torch.sub(a, v, out=v)
    torch.mul(v, v, out=vv)


def _similarity(means, shift_x, shift_v, twice_c1, twice_c2, spare, slopes):
    """Sum of SSIM from the means of a stack, which it overwrites; fills the three slopes."""
    x, v, var, var_v = means.unbind(1)
    u, vv, luminance, cs = spare.unbind(1)
    d_mean, d_uu, d_vv = slopes.unbind(1)
    torch.sub(v, x, alpha=2, out=u)  # less u's mean
    var.addcmul_(u, u, value=-1).clamp_min_(twice_c2)
    var_v.addcmul_(v, v, value=-1).clamp_min_(0)
    var += var_v
    k = var_v.div_(var)
    torch.addcmul(v, k, x, value=-2, out=d_mean)
    x += shift_x
    v += shift_v
    torch.sub(v, x, alpha=2, out=u)
    torch.mul(v, v, out=vv)
    power = torch.addcmul(twice_c1, u, u, out=u).add_(vv)
    j = vv.div_(power)
    f = v.addcmul_(j, x, value=-2).div_(power)  # -f
    one = torch.ones((), **FLOAT)
    torch.sub(one, j, alpha=2, out=luminance)
    torch.sub(one, k, alpha=2, out=cs)
    torch.div(luminance, var, out=d_vv)
    torch.mul(k, d_vv, out=d_uu)
    d_mean.mul_(d_vv).addcmul_(f, cs, value=-1)
    return luminance.mul_(cs).sum()


def _combine(adjoint, stack):
    """A quarter of d SSIM / dx', (h, k, w); overwrites the slopes' adjoints."""
    d_mean, d_uu, d_vv = adjoint.unbind(1)
    return d_mean.addcmul_(d_uu, stack[:, 0], value=2).addcmul_(d_vv, stack[:, 1], value=-1)


@lru_cache(maxsize=128)  # sizes of the maps of a few dozen image sizes
def _matrices(height, width, window_size, sigma, border):
    """B along each axis of maps of one size."""
    like = torch.empty(0, dtype=torch.float64, device="cpu")
    window = Window((height, width), window_size, sigma, border, like)
    return [_matrix(n, w, border) for n, w in zip((height, width), window.weights)]


@lru_cache(maxsize=128)
def _axes(*blur):
    """B and its adjoint for the compiled form."""
    return [ssim_compiled.axis_of(m) for m in _matrices(*blur)]


@lru_cache(maxsize=128)
def _blurs(*blur):
    """B and its adjoint as products."""
    axes = _matrices(*blur)
    return _Blur(axes), _Blur([m.t() for m in axes])


def _matrix(size, weights, border):
    """B along an axis of `size` cells, (cells of the result, size)."""
    radius = 0 if border == "valid" else len(weights) // 2
    mode = "reflect" if border == "reflect" else "constant"
    impulses = torch.eye(size, dtype=weights.dtype, device=weights.device)[:, None]
    impulses = F.pad(impulses, (radius, radius), mode)
    matrix = F.conv1d(impulses, weights[None, None])[:, 0].t()
    return matrix / matrix.sum(1, keepdim=True) if border == "renormalize" else matrix


class _Blur:
    """A product with a banded matrix along each axis of stacked maps (H, S, k, W)."""

    def __init__(self, axes):
        self.size = [len(m) for m in axes]
        self.rows, self.columns = (list(_blocks(m, n)) for m, n in zip(axes, BLOCKS))
        self.short = max(axes[1].shape) <= SHORT
        self.filters = axes[1].float()[..., None, None]

    def __call__(self, stack, down, across):
        """Fills the two buffers, the second one unless rows are short; returns (H, S, k, W)."""
        (h, w), (_, s, k, width) = self.size, stack.shape
        stack, down = stack.flatten(1), _view(down, h, s * k * width)
        for out, seen, weights in self.rows:
            torch.mm(weights, stack[seen], out=down[out])
        if self.short:  # a 1 x 1 convolution of channels_last images whose channels are the columns
            images = down.view(h * s, k, 1, width).permute(0, 3, 1, 2)
            return F.conv2d(images, self.filters).permute(0, 2, 3, 1).reshape(h, s, k, w)
        down, across = down.view(-1, width), _view(across, h * s * k, w)
        for out, seen, weights in self.columns:
            torch.mm(down[:, seen], weights.t(), out=across[:, out])
        return across.view(h, s, k, w)


def _blocks(matrix, length):
    """Cuts a banded matrix: rows, the columns that they are not 0 in, and what is there.

    All blocks are of one length, so that the last one may do some of its neighbour's rows again.
    """
    length = length if len(matrix) >= 2 * length else len(matrix)
    for start in range(0, len(matrix), length):
        first = min(start, len(matrix) - length)
        block = matrix[first : first + length]
        seen = block.any(0).nonzero()
        columns = slice(int(seen[0]), int(seen[-1]) + 1)
        yield slice(first, first + length), columns, block[:, columns].float().contiguous()
