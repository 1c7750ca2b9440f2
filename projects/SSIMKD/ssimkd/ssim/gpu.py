"""The SSIM loss of normalised maps on a GPU: `ssim_triton.py`'s kernels, once they are trusted.

Equal to `normalize.py`, `Context.crops` and :func:`ssimkd.ssim.ssim_loss` one after the other,
which define it. Normalisation and crops need no maps of their own, only numbers for the kernels.

The kernels have been checked without a GPU, never on one. So the first maps of a kind on a device
make them prove themselves: on small random maps they must give what autograd gives. If they do not,
autograd goes on doing the work, and a warning says why.
"""

import logging
from functools import lru_cache
from typing import Any, List, Tuple

import torch
from torch import Tensor

from ssimkd.errors import one_line

from .definition import ssim_map
from .normalize import AFFINE, affines, inside_of, normalize_maps
from .triton_loss import available, ssim_loss_triton

logger = logging.getLogger(__name__)

# Maps of the trial: two strips of columns and two chunks of rows, the second image padded
TRIAL_SHAPE, TRIAL_CELLS = (2, 2, 101, 70), [(101, 70), (37, 66)]
# Deviation from autograd, as a share of the largest gradient; of float32 and of half precision,
# whose gradient is rounded
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def covers(student: Tensor, teacher: Tensor, normalize: str, **options: Any) -> bool:
    """Whether :func:`ssim_loss` holds for such maps and options, and is right on their device."""
    return (
        student.shape == teacher.shape
        and student.dim() == 4
        and student.numel() > 0
        and normalize in AFFINE
        and available(student, **options)
        and available(teacher, **options)
        and trusted(student.device, student.dtype, tuple(sorted(options.items())))
    )


def ssim_loss(
    student: Tensor,
    teacher: Tensor,
    cells: List[Tuple[int, int]],
    normalize: str,
    normalize_scope: str,
    **options: Any,
) -> Tensor:
    """The mean over images of (1 - SSIM) / 2; nothing waits for the GPU.

    Args:
        student (Tensor): (N, C, H, W), gradient flows once, also through its normalisation.
        teacher (Tensor): (N, C, H, W), constant.
        cells (list[(int, int)]): height and width that each image covers of its maps.
        normalize, normalize_scope (str): see `normalize.py`.
        options: those of :func:`ssimkd.ssim.ssim_map`; see :func:`covers`.

    Returns:
        Tensor: scalar in [0, 1], float32.
    """
    sizes = inside = None
    if any(size != tuple(student.shape[2:]) for size in cells):
        # from pinned memory: an ordinary copy would wait until the GPU is done
        sizes = torch.tensor(cells, device="cpu", pin_memory=student.is_cuda)
        sizes = sizes.to(student.device, non_blocking=True)
        inside = inside_of(sizes, student)
    maps = (student.float(), teacher.detach().float())  # for their statistics
    pairs = affines(*maps, normalize, normalize_scope, inside)
    student_affine, teacher_affine = ((a.flatten(1), b.flatten(1)) for a, b in pairs)
    loss = ssim_loss_triton(student, teacher, student_affine, teacher_affine, sizes, **options)
    return loss.mean()


@torch.compiler.assume_constant_result
def trusted(device: torch.device, dtype: torch.dtype, options: Tuple[Tuple[str, Any], ...]) -> bool:
    """Whether the kernels agree with autograd on this device; tried once for maps of a kind."""
    return _trial(device, dtype, options)


@lru_cache(maxsize=64)
def _trial(device, dtype, options) -> bool:
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            deviation = _deviation(device, dtype, dict(options))
        if deviation <= LIMITS[dtype]:
            return True
        reason = f"a gradient deviates by {deviation:.1e} of the largest"
    except Exception as error:  # of Triton, its compiler, the driver: all kinds
        reason = one_line(error)
    logger.warning(
        "The Triton kernels of the SSIM loss failed their trial on %s (%s), so that PyTorch's own "
        "operators do the work: right, but slower. benchmarks/gpu_check.py says more",
        device,
        reason,
    )
    return False


def _deviation(device, dtype, options) -> float:
    """Of loss (absolute) or gradient (relative) on random maps, the larger one; NaN is one, too."""
    generator = torch.Generator().manual_seed(0)  # the run's own draws stay the same
    x, noise = torch.rand(2, *TRIAL_SHAPE, generator=generator, device="cpu")
    student, teacher = (m.to(device, dtype) for m in (x, (x + noise) / 2))
    kernel = student.clone().requires_grad_()
    loss = ssim_loss(kernel, teacher, TRIAL_CELLS, "minmax", "channel", **options)
    exact = student.double().requires_grad_()
    losses = []
    for image, (h, w) in enumerate(TRIAL_CELLS):
        one, other = (m[image : image + 1, :, :h, :w] for m in (exact, teacher.double()))
        pair = normalize_maps(one, other, "minmax", "channel", None)
        losses.append((1 - ssim_map(*pair, **options).mean()) / 2)
    known = torch.stack(losses).mean()
    # a mean's gradient is below what float16 holds
    gradient, expected = (
        torch.autograd.grad(v * x.numel(), m)[0] for v, m in ((loss, kernel), (known, exact))
    )
    by_gradient = (gradient - expected).abs().max() / expected.abs().max()
    worst = torch.stack([by_gradient, (loss - known).abs()]).max()  # NaN stays NaN
    return float(worst)
