"""SSIM as a loss on a GPU, value and gradient by the Triton kernels of `ssim_kernels.py`.

    symbol      name
    affine      offset and scale that normalise a map as it is read: (map - offset) * scale
    sizes       rows and columns of a map that belong to the image; the others only pad it
    slopes      what the backward kernel needs of the forward one, three maps

Two operators, so that torch.compile and CUDA graphs take the kernels as they are: nothing waits for
the GPU, and no shape or launch depends on data.
"""

import math
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

try:
    import triton

    from . import triton_kernels as ssim_kernels
except ImportError:  # there is no Triton for every platform: `available` says so
    triton = None

MAX_WINDOW = 11  # wider ones would not fit the registers
BORDERS = ("renormalize", "zero")
EXPONENTS = ((1.0, 1.0, 1.0), (0.0, 1.0, 1.0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 96  # at most that many rows of a map for one program: 2 radius of them are walked twice
BLOCK = 64  # columns of a strip, one per thread

Pair = Tuple[Tensor, Tensor]


def available(
    maps: Tensor,
    window_size: int = 11,
    exponents: Sequence[float] = (1.0, 1.0, 1.0),
    border: str = "renormalize",
    **_: object,
) -> bool:
    """Whether :func:`ssim_loss_triton` takes maps like these, with these options of `ssim_map`."""
    known = border in BORDERS and tuple(exponents) in EXPONENTS and window_size <= MAX_WINDOW
    return known and triton is not None and maps.is_cuda and maps.dtype in DTYPES


def ssim_loss_triton(
    student: Tensor,
    teacher: Tensor,
    student_affine: Pair,
    teacher_affine: Pair,
    sizes: Optional[Tensor] = None,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    data_range: float = 1.0,
    exponents: Sequence[float] = (1.0, 1.0, 1.0),
    border: str = "renormalize",
) -> Tensor:
    """(1 - SSIM) / 2 of normalised maps, averaged over the channels and cells of each image.

    Args:
        student (Tensor): (N, C, H, W), float32, bfloat16 or float16; gradient flows, once.
        teacher (Tensor): (N, C, H, W), any of these types, treated as constant.
        student_affine (Tensor, Tensor): offset and scale, each (N, C) or expanding to it; compared
            is (student - offset) * scale. Gradient flows to both.
        teacher_affine (Tensor, Tensor): the same for the teacher, treated as constant.
        sizes (Tensor or None): (N, 2) integers on the maps' device, the height and width in cells
            (1 to H, 1 to W) of what each image covers; other cells take no part and may hold
            anything, as if cut off. None: all cells.
        window_size, sigma, k1, k2, data_range, exponents, border: as in
            :func:`ssimkd.ssim.ssim_map`, within what `available` knows.

    Returns:
        Tensor: (N,), float32, in [0, 1].

    Raises:
        ValueError: shapes differ or are not 4-D, no cells, or an option that is not known here.
    """
    if student.shape != teacher.shape or student.dim() != 4 or student.numel() == 0:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"expected two equal, non-empty shapes (N, C, H, W), got {shapes}")
    if border not in BORDERS or tuple(exponents) not in EXPONENTS:
        raise ValueError(f"border {border!r} with exponents {exponents!r} has no Triton kernel")
    if not (0 < window_size <= MAX_WINDOW and window_size % 2 == 1):
        raise ValueError(f"window_size must be odd, 1 to {MAX_WINDOW}, got {window_size!r}")
    n, channels, height, width = student.shape
    affine = [a.float().expand(n, channels) for a in (*student_affine, *teacher_affine)]
    if sizes is None:
        sides = [torch.full((n,), side, device=student.device) for side in (height, width)]
        sizes = torch.stack(sides, dim=1)
    needs_gradient = student.requires_grad or any(a.requires_grad for a in student_affine)
    return _forward_op(
        student,
        teacher.detach(),
        torch.stack([*affine[:2], *(a.detach() for a in affine[2:])]),
        sizes,
        _gaussian(window_size, sigma),
        (k1 * data_range) ** 2,
        (k2 * data_range) ** 2,
        border == "renormalize",
        exponents[0] == 1,
        torch.is_grad_enabled() and needs_gradient,
    )[0]


def _gaussian(window_size: int, sigma: float) -> List[float]:
    """Weights of the window's cells along one axis; their sum is 1."""
    cells = range(-(window_size // 2), window_size // 2 + 1)
    weights = [math.exp(-(cell**2) / (2 * sigma**2)) for cell in cells]
    return [weight / sum(weights) for weight in weights]


# --- operators: opaque to torch.compile, recorded by CUDA graphs ---


@torch.library.custom_op(
    "ssimkd::ssim_loss",
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor affine, Tensor sizes, float[] weights, "
    "float c1, float c2, bool renormalize, bool luminance, bool slopes) -> (Tensor, Tensor)",
)
def _forward_op(
    student, teacher, affine, sizes, weights, c1, c2, renormalize, luminance, slopes
) -> Pair:
    """The loss, (N,), and its slopes (d, v, u), (3, N, C, H + 2 radius, W + 2 radius)."""
    n, channels, height, width = student.shape
    margin = len(weights) - 1
    derivatives = student.new_empty(_slopes_shape(student, weights, slopes), dtype=torch.float32)
    grid, tiling = _tile(n * channels, height + margin, width + margin)
    sums = student.new_empty(grid, dtype=torch.float32)
    with torch.cuda.device_of(student):
        ssim_kernels.forward_kernel[grid](
            *_inputs(student, teacher, affine, sizes),
            *tiling,
            derivatives,
            sums,
            c1,
            c2,
            renormalize,
            luminance,
            slopes,
            **_constants(weights, width + margin),
        )
    return sums.view(n, -1).sum(1), derivatives


@_forward_op.register_fake
def _(student, teacher, affine, sizes, weights, c1, c2, renormalize, luminance, slopes) -> Pair:
    shape = _slopes_shape(student, weights, slopes)
    loss = student.new_empty(student.shape[0], dtype=torch.float32)
    return loss, student.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(
    "ssimkd::ssim_loss_backward",
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor affine, Tensor sizes, Tensor slopes, "
    "Tensor upstream, float[] weights) -> (Tensor, Tensor)",
)
def _backward_op(student, teacher, affine, sizes, slopes, upstream, weights) -> Pair:
    """Gradients by the student's map and by `affine`, whose teacher rows are zero."""
    n, channels, height, width = student.shape
    gradient = student.new_empty(student.shape)
    grid, tiling = _tile(n * channels, height, width)
    sums = affine.new_empty((2, *grid))
    with torch.cuda.device_of(student):
        ssim_kernels.backward_kernel[grid](
            *_inputs(student, teacher, affine, sizes),
            *tiling,
            slopes,
            upstream.contiguous(),
            gradient,
            sums,
            **_constants(weights, width),
        )
    by_affine = sums.view(2, n, channels, -1).sum(-1)
    return gradient, torch.cat([by_affine, torch.zeros_like(by_affine)])


@_backward_op.register_fake
def _(student, teacher, affine, sizes, slopes, upstream, weights) -> Pair:
    return student.new_empty(student.shape), torch.empty_like(affine)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, affine, sizes, ctx.weights = inputs[:5]
    ctx.save_for_backward(student, teacher, affine, sizes, output[1])
    ctx.set_materialize_grads(False)  # or three maps of zeros would arrive for the slopes


def _backward(ctx, upstream, _):
    gradient, by_affine = None, None
    if upstream is not None:
        gradient, by_affine = _backward_op(*ctx.saved_tensors, upstream, ctx.weights)
    return gradient, None, by_affine, *[None] * 7


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _slopes_shape(student: Tensor, weights: Sequence[float], slopes: bool) -> Tuple[int, ...]:
    n, channels, height, width = student.shape
    margin = len(weights) - 1
    return (3, n, channels, height + margin, width + margin) if slopes else (0,)


def _inputs(student: Tensor, teacher: Tensor, affine: Tensor, sizes: Tensor) -> tuple:
    """The kernels' first arguments; strides of n, c and rows spare the copy of a cropped map."""
    student, teacher = (m if m.stride(3) == 1 else m.contiguous() for m in (student, teacher))
    strides = (*student.stride()[:3], *teacher.stride()[:3])
    return student, teacher, affine, sizes.contiguous(), *strides, *student.shape[1:]


def _block(width: int) -> int:
    return min(BLOCK, max(32, triton.next_power_of_2(width)))


def _tile(maps: int, height: int, width: int) -> Tuple[Tuple[int], Tuple[int, int, int]]:
    """Grid, and (strips, chunks, rows of a chunk) of a map."""
    strips, chunks = triton.cdiv(width, _block(width)), triton.cdiv(height, ROWS)
    return (maps * strips * chunks,), (strips, chunks, triton.cdiv(height, chunks))


def _constants(weights: Sequence[float], width: int) -> dict:
    block = _block(width)
    return dict(
        weights=tuple(weights), radius=len(weights) // 2, block=block, num_warps=block // 32
    )
