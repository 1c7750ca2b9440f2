"""The SSIM loss with its gradient formed in the forward: what the fast backends have in common.

With z = (x - offset) * scale the normalised student, every backend has a kernel that takes stacks
of maps of one size and returns their dissimilarity 1 - SSIM and its gradient by z. Here are the
statistics behind offset and scale, and the gradient through them.

    symbol      name                             shape
    x, y        student and teacher maps         (M, h, w), M maps of one size
    level       a value near a map's mean        (M,)
    x', y'      maps about their level           (x - level) * scale; kernels round less with them
    shift       z = x' + shift                   (M,)
    affine      level, scale, shift of x, of y   (6, M)

A kernel is called as kernel(x, y, affine, options, gradient, factor). `options` are those of
:func:`ssim_map`. It returns (3, M), means over each map of 1 - SSIM, of its gradient by z and of
that times x'; the last two only if `gradient` is not None. It fills `gradient`, (M, h, w), with the
gradient by x, times `factor`. Cells of a row lie side by side in x, y and `gradient`.
"""

import weakref
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from .normalize import AFFINE, SCOPES, inverse_width

Kernel = Callable[..., Tensor]
Sizes = Sequence[Tuple[int, int]]


def covers(student: Tensor, teacher: Tensor, normalize: str) -> bool:
    """Whether these maps are supported here. A backend's own `covers` is about its kernel."""
    return normalize in AFFINE and student.device == teacher.device


def one_pass_loss(
    student: Tensor,
    teacher: Tensor,
    sizes: Sizes,
    normalize: str,
    normalize_scope: str,
    options: Dict[str, Any],
    kernel: Kernel,
    reference: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The mean over images of (1 - SSIM) / 2.

    Args:
        student (Tensor): (N, C, H, W), gradient flows, also through its normalisation.
        teacher (Tensor): (N, C, H, W), constant.
        sizes (list[(int, int)]): height and width, in cells, that each image covers.
        normalize, normalize_scope (str): see `normalize.py`; one of AFFINE.
        options (dict): those of :func:`ssim_map`.
        kernel (callable): see the head of this file.
        reference (callable): (student, teacher) -> the same loss by autograd, for a second backward
            or a second derivative.

    Returns:
        Tensor: scalar in [0, 1], float32; float64 for maps in float64.
    """
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    settings = (sizes, normalize, normalize_scope, options, kernel, with_gradient)
    # Weak: kept until the backward, the teacher's maps would cost as much as the gradient
    return _OnePassLoss.apply(student, teacher.detach(), weakref.ref(teacher), settings, reference)


class _OnePassLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, teacher_ref, settings, reference):
        with torch.autocast(student.device.type, enabled=False):
            value, gradient = _evaluate(student, teacher, *settings)
        ctx.save_for_backward(student)
        ctx.gradient, ctx.teacher_ref, ctx.reference = gradient, teacher_ref, reference
        return value

    @staticmethod
    def backward(ctx, upstream):
        (student,), twice = ctx.saved_tensors, torch.is_grad_enabled()
        # returned without a copy, so it can be used once
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None and not twice:
            return gradient.mul_(upstream).to(student.dtype), None, None, None, None
        teacher = ctx.teacher_ref()
        if teacher is None:
            raise RuntimeError(
                "a second backward of the SSIM loss needs the teacher's maps, which are deleted: "
                "set MODEL.DISTILL.SSIM.BACKEND definition (ssim_loss: backend='definition')"
            )
        with torch.enable_grad():
            loss = ctx.reference(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student, upstream, create_graph=twice)
        return gradient, None, None, None, None


def _evaluate(student, teacher, sizes, normalize, scope, options, kernel, with_gradient):
    """The loss and, if `with_gradient`, its gradient, (N, C, H, W)."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    maps, shape = student.shape[:2].numel(), (*student.shape[:2], 1, 1)
    x_stacks, y_stacks, gradients = stacks_of(student, sizes), stacks_of(teacher, sizes), None
    if with_gradient:
        whole = all(tuple(size) == tuple(student.shape[2:]) for size in sizes)
        gradient = (torch.empty if whole else torch.zeros)(
            student.shape, dtype=dtype, device=student.device
        )
        gradients = stacks_of(gradient, sizes)
    if normalize == "none":
        nothing = torch.zeros(maps, dtype=dtype, device=student.device)
        x_normal = y_normal = nothing, nothing + 1
    else:
        y_ends = [
            _Extreme(pick, y_stacks, shape, SCOPES[scope]) for pick in (torch.amin, torch.amax)
        ]
        x_ends = y_ends
        if normalize == "minmax":
            x_ends = [_Extreme(end.pick, x_stacks, shape, SCOPES[scope]) for end in y_ends]
        x_normal, y_normal = (_offset_and_scale(ends, dtype) for ends in (x_ends, y_ends))
    affine = torch.cat([_about_level(x_stacks, *x_normal), _about_level(y_stacks, *y_normal)])
    affines = affine.split([len(x) for x in x_stacks], dim=1)
    results = [
        kernel(x, y, a, options, g, 1 / (2 * maps))
        for x, y, a, g in zip(x_stacks, y_stacks, affines, gradients or [None] * len(x_stacks))
    ]
    loss, total, moment = torch.cat(results, dim=1).to(dtype) / (2 * maps)
    if not with_gradient:
        return loss.sum(), None
    if normalize == "minmax":
        moment = moment + total * affine[2]  # from x' to z
        total, moment = (
            (m * affine[1]).view(shape).sum(SCOPES[scope], keepdim=True) for m in (total, moment)
        )
        # z = (x - low) / (high - low): dz / dlow = (z - 1) / width, dz / dhigh = -z / width
        x_ends[0].add_gradient(moment - total, gradients)
        x_ends[1].add_gradient(-moment, gradients)
    return loss.sum(), gradient


def stacks_of(maps: Tensor, sizes: Sizes) -> List[Tensor]:
    """What images cover of their maps (N, C, H, W): (M, h, w) each, all N C maps where they agree.

    They are views unless the cells of a row lie apart in memory.
    """
    if len(set(sizes)) == 1:
        h, w = sizes[0]
        stacks = [maps[:, :, :h, :w].flatten(0, 1)]
    else:
        stacks = [m[:, :h, :w] for m, (h, w) in zip(maps, sizes)]
    return [m if m.stride(2) == 1 else m.contiguous() for m in stacks]


def _offset_and_scale(ends, dtype) -> Tuple[Tensor, Tensor]:
    """From the lowest and highest values to [0, 1], (N C) each."""
    low, high = (end.value.to(dtype).flatten() for end in ends)
    return low, inverse_width(high - low)


def _about_level(stacks, offset, scale) -> Tensor:
    """Level, scale and shift of maps, (3, N C)."""
    # A level need only be near the mean, and one that the maps' own type can hold
    level = torch.cat([m[:, ::4].mean((1, 2)) for m in stacks]).to(scale.dtype)
    return torch.stack([level, scale, (level - offset) * scale])


def _rows_that_hold(by_row: Tensor, end: Tensor) -> tuple:
    """Index of the rows that hold their map's extreme.

    On a GPU it is that of all rows, because the host would wait for the number of selected rows.
    """
    return (slice(None),) * 2 if by_row.is_cuda else (by_row == end).nonzero(as_tuple=True)


class _Extreme:
    """The lowest or highest values of maps, and the cells that hold them."""

    def __init__(self, pick, stacks, shape, dims):
        """`pick` is torch.amin or torch.amax; the `dims` of (N, C, H, W) share one value."""
        self.pick, self.stacks = pick, stacks
        self.by_row = [pick(m, 2) for m in stacks]
        value = torch.cat([pick(rows, 1) for rows in self.by_row]).view(shape)
        self.value = pick(value, dims, keepdim=True).expand(shape)
        self.dims = dims

    def add_gradient(self, slope, gradients) -> None:
        """Adds a slope by `value` to the cells that hold it, in equal shares.

        Args:
            slope (Tensor): like `value`, or 1 where it is shared.
            gradients (list[Tensor]): (M, h, w) each, like the maps.
        """
        split = [len(m) for m in self.stacks]
        found, counts = [], []
        for m, rows, end in zip(self.stacks, self.by_row, self.value.flatten().split(split)):
            end = end[:, None].expand_as(rows)
            where = _rows_that_hold(rows, end)
            hits = m[where] == end[where][..., None]
            count = torch.zeros_like(rows, dtype=slope.dtype)
            count[where] = hits.sum(-1, dtype=slope.dtype)
            found.append((where, hits))
            counts.append(count.sum(1))
        count = torch.cat(counts).view(self.value.shape).sum(self.dims, keepdim=True)
        shares = (slope / count).expand_as(self.value).flatten().split(split)
        for gradient, share, (where, hits) in zip(gradients, shares, found):
            share = share[:, None].expand(gradient.shape[:2])[where]
            gradient[where] += hits * share[..., None]
