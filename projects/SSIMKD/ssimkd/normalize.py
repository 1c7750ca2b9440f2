"""psi of the paper: what makes student and teacher maps comparable before a loss sees them.

Maps are (N, C, H, W). `inside` is None or a boolean (N, 1, H, W): cells outside an image take no
part in the statistics.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

# Kind -> dynamic range L of what it returns, in its own units (for SSIM's C1 and C2).
NORMALIZATIONS = {
    "minmax": 1.0,  # each map from its own [min, max] to [0, 1] (the paper)
    "teacher_range": 1.0,  # both maps from the teacher's [min, max] to [0, 1]
    "standardize": 6.0,  # each map to mean 0 and deviation 1: three deviations to either side
    "none": 1.0,  # raw features
}
# Scope -> the dimensions that share one statistic.
SCOPES = {"channel": (2, 3), "image": (1, 2, 3), "batch": (0, 1, 2, 3)}
TINY = 1e-6  # a range or deviation below this is a flat map: it becomes 0, without gradient


def check_options(normalize: str, normalize_scope: str) -> None:
    """Raises ValueError, naming the option, where one is unknown."""
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}")
    if normalize_scope not in SCOPES:
        raise ValueError(
            f"normalize_scope must be one of {', '.join(SCOPES)}, got {normalize_scope!r}"
        )


def normalize_maps(
    student: Tensor, teacher: Tensor, normalize: str, normalize_scope: str, inside: Optional[Tensor]
) -> Tuple[Tensor, Tensor]:
    """Rescales both maps.

    Args:
        student, teacher (Tensor): (N, C, H, W); gradient flows to the student, through its
            statistics as well.
        normalize (str): a key of NORMALIZATIONS.
        normalize_scope (str): a key of SCOPES.
        inside (Tensor or None): see the head of this file.

    Returns:
        (Tensor, Tensor): (N, C, H, W) each.
    """
    check_options(normalize, normalize_scope)
    dims = SCOPES[normalize_scope]
    if normalize == "none":
        return student, teacher
    if normalize == "standardize":
        return _standardize(student, dims, inside), _standardize(teacher, dims, inside)
    teacher_range = _range(teacher, dims, inside)
    student_range = _range(student, dims, inside) if normalize == "minmax" else teacher_range
    return _rescale(student, *student_range), _rescale(teacher, *teacher_range)


def _range(x: Tensor, dims: Tuple[int, ...], inside: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """Minimum of x over `dims` and distance to its maximum, both keeping their dimensions."""
    low = x if inside is None else x.masked_fill(~inside, float("inf"))
    high = x if inside is None else x.masked_fill(~inside, -float("inf"))
    minimum = low.amin(dims, keepdim=True)
    return minimum, high.amax(dims, keepdim=True) - minimum


def _standardize(x: Tensor, dims: Tuple[int, ...], inside: Optional[Tensor]) -> Tensor:
    """x less its mean, over its (biased) standard deviation."""
    x = x - _range(x.detach(), dims, inside)[0]  # flat maps become 0 exactly, whatever their level
    known = x if inside is None else x.masked_fill(~inside, 0)
    weight = torch.ones_like(x[:, :1]) if inside is None else inside.to(x.dtype)
    weight = weight.expand_as(x)
    weight = weight / weight.sum(dims, keepdim=True)
    mean = (known * weight).sum(dims, keepdim=True)
    variance = ((known - mean) ** 2 * weight).sum(dims, keepdim=True)
    flat = variance <= TINY**2
    deviation = torch.where(flat, torch.ones_like(variance), variance).sqrt()
    return _rescale(x, mean, torch.where(flat, torch.zeros_like(variance), deviation))


def _rescale(x: Tensor, offset: Tensor, width: Tensor) -> Tensor:
    """(x - offset) / width; 0 where the width is none."""
    scale = torch.where(width > TINY, 1 / width.clamp_min(TINY), torch.zeros_like(width))
    return (x - offset) * scale
