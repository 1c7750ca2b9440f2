"""The kernel of `one_pass.py` for GPUs in Triton.

It has been checked without a GPU and never run on one. So a trial precedes its first use for each
kind of maps on a device: on small random maps it must give what the definition gives. If it does
not, or cannot be compiled, PyTorch's operators compute the loss, and one warning says why.
"""

import logging
import subprocess
from functools import lru_cache
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from .definition import ssim_map
from .window import gaussian

try:
    import triton

    from . import triton_kernels
except ImportError:  # there is no Triton for every platform
    triton = None
    FAILURES: tuple = ()
else:
    # What Triton, its compiler and the C compiler that it calls raise
    FAILURES = (
        *(triton.errors.TritonError, subprocess.SubprocessError),
        *(AssertionError, OSError, RuntimeError),
    )

logger = logging.getLogger(__name__)

SWITCH = "MODEL.DISTILL.SSIM.BACKEND analytic (ssim_loss: backend='analytic')"
MAX_WINDOW = 11  # the registers hold no more
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 96  # at most that many rows of a map for one program: 2 radius of them are walked twice
BLOCK = 64  # columns of a strip, one per thread
CELLS = 2**25  # maps taken at a time; the slopes in between take three times their memory
# The trial's maps have two strips of columns and two chunks of rows
TRIAL_SHAPE = (4, 101, 70)
# Deviation from the definition, as a share of the largest gradient
LIMIT = 1e-4


def covers(student: Tensor, teacher: Tensor, options: Dict[str, Any]) -> bool:
    """Whether :func:`kernel` supports such maps and options, and is right on their device."""
    return (
        triton is not None
        and student.is_cuda
        and {student.dtype, teacher.dtype} <= set(DTYPES)
        and options["border"] in ("renormalize", "zero")
        and options["exponents"] in ((1, 1, 1), (0, 1, 1))
        and options["window_size"] <= MAX_WINDOW
        and passes_self_test(student.device, student.dtype, teacher.dtype, tuple(options.items()))
    )


def kernel(
    x: Tensor,
    y: Tensor,
    affine: Tensor,
    options: Dict[str, Any],
    gradient: Optional[Tensor],
    factor: float,
) -> Tensor:
    """See the head of `one_pass.py`. Nothing waits for the GPU."""
    step = max(1, CELLS // x[0].numel())
    parts = [slice(start, start + step) for start in range(0, len(x), step)]
    results = [
        _launch(
            x[k], y[k], affine[:, k], options, None if gradient is None else gradient[k], factor
        )
        for k in parts
    ]
    return torch.cat(results, dim=1)


def _launch(x, y, affine, options, gradient, factor) -> Tensor:
    """:func:`kernel` of as many maps as are taken at a time."""
    (maps, height, width), weights = x.shape, gaussian_weights(options)
    margin, cells = len(weights) - 1, height * width
    c1, c2 = ((options[k] * options["data_range"]) ** 2 for k in ("k1", "k2"))
    inputs = x, y, *x.stride()[:2], *y.stride()[:2], affine.contiguous(), height, width
    slopes_shape = (3, maps, height + margin, width + margin) if gradient is not None else (0,)
    slopes = affine.new_empty(slopes_shape)
    grid, tiling = _tile(maps, height + margin, width + margin)
    sums = affine.new_empty(grid)
    with torch.cuda.device_of(x):
        triton_kernels.forward_kernel[grid](
            *inputs,
            *tiling,
            slopes,
            sums,
            c1,
            c2,
            renormalize=options["border"] == "renormalize",
            luminance=options["exponents"][0] == 1,
            with_slopes=gradient is not None,
            **_constants(weights, width + margin),
        )
        dissimilarity = sums.view(1, maps, -1).sum(2) / cells
        if gradient is None:
            return torch.cat([dissimilarity, dissimilarity.new_zeros(2, maps)])
        grid, tiling = _tile(maps, height, width)
        sums = affine.new_empty((2, *grid))
        triton_kernels.backward_kernel[grid](
            *inputs,
            *tiling,
            slopes,
            gradient,
            *gradient.stride()[:2],
            sums,
            factor / cells,
            **_constants(weights, width),
        )
    return torch.cat([dissimilarity, sums.view(2, maps, -1).sum(2) / cells])


def gaussian_weights(options: Dict[str, Any]) -> Tuple[float, ...]:
    """Weights of the window's cells along one axis; their sum is 1."""
    like = torch.empty(0, dtype=torch.float64, device="cpu")
    return tuple(gaussian(options["window_size"] // 2, options["sigma"], like).tolist())


def _block(width: int) -> int:
    return min(BLOCK, max(32, triton.next_power_of_2(width)))


def _tile(maps: int, height: int, width: int) -> Tuple[Tuple[int], Tuple[int, int, int]]:
    """Grid, and (strips, chunks, rows of a chunk) of a map."""
    strips, chunks = triton.cdiv(width, _block(width)), triton.cdiv(height, ROWS)
    return (maps * strips * chunks,), (strips, chunks, triton.cdiv(height, chunks))


def _constants(weights: Tuple[float, ...], width: int) -> Dict[str, Any]:
    block = _block(width)
    return dict(weights=weights, radius=len(weights) // 2, block=block, num_warps=block // 32)


# --- the trial ---


@lru_cache(maxsize=64)
def passes_self_test(
    device: torch.device, x_dtype: torch.dtype, y_dtype: torch.dtype, options
) -> bool:
    """Whether the kernel agrees with the definition on this device; tried once for maps of a kind.

    Raises:
        RuntimeError: the kernel failed, and the process cannot go on with this GPU.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            deviation = _deviation(device, x_dtype, y_dtype, dict(options))
    except torch.cuda.OutOfMemoryError:
        raise
    except FAILURES as error:
        if not works(device):
            raise RuntimeError(
                f"The Triton kernels of the SSIM loss failed on {device}. {SWITCH} does without "
                f"them: {error}"
            ) from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        if deviation <= LIMIT:
            return True
        reason = f"a gradient deviates by {deviation:.1e} of the largest"
    logger.warning(
        "The Triton kernels of the SSIM loss failed their trial on %s (%s). PyTorch's own "
        "operators compute the loss instead, which is slower. See benchmarks/gpu_check.py",
        device,
        reason,
    )
    return False


def works(device: torch.device) -> bool:
    """Whether a device still computes, after a kernel has failed on it."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


def _deviation(device, x_dtype, y_dtype, options) -> float:
    """The larger of the deviations of value and gradient; NaN if either is NaN."""
    generator = torch.Generator().manual_seed(0)  # the run's own draws stay the same
    x, noise = torch.rand(2, *TRIAL_SHAPE, generator=generator, device="cpu")
    x, y = x.to(device, x_dtype), ((x + noise) / 2).to(device, y_dtype)
    numbers: List[float] = [0.5, 1.5, 0.75, 0.25, 0.5, 0.5]  # level, scale, shift of x and y
    affine = torch.tensor(numbers, dtype=torch.float32, device=device)[:, None].expand(-1, len(x))
    gradient = torch.empty(x.shape, dtype=torch.float32, device=device)
    found = kernel(x, y, affine, options, gradient, 1.0)
    exact = x.double().requires_grad_()
    pair = (m[None] for m in ((exact - 0.5) * 1.5 + 0.75, (y.double() - 0.25) * 0.5 + 0.5))
    similarity = ssim_map(*pair, **options)
    (known,) = torch.autograd.grad(-similarity.sum() / x[0].numel(), exact)
    by_gradient = (gradient - known).abs().max() / known.abs().max()
    by_value = (found[0] - (1 - similarity[0].mean((1, 2)))).abs().max()
    return float(torch.stack([by_gradient, by_value]).max())
