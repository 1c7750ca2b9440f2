"""psi of the paper: what makes student and teacher maps comparable before a loss sees them.

Maps are (N, C, H, W). `inside` is None or a boolean (N, 1, H, W): cells outside an image take no
part in the statistics.
"""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

# Kind -> dynamic range L of what it returns, in its own units (for SSIM's C1 and C2).
NORMALIZATIONS = {
    "minmax": 1.0,  # each map from its own [min, max] to [0, 1] (the paper)
    "teacher_range": 1.0,  # both maps from the teacher's [min, max] to [0, 1]
    "standardize": 6.0,  # each map to mean 0 and deviation 1: three deviations to either side
    "none": 1.0,  # raw features
}
# Kinds that are an offset and a scale, taken from lowest and highest values
AFFINE = ("minmax", "teacher_range", "none")
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


def inside_of(sizes: Sequence[Tuple[int, int]], maps: Tensor) -> Tensor:
    """(N, 1, H, W), true for the first rows and columns of each map, as many as `sizes` says.

    A list would have to be copied to a GPU; these numbers are arguments of its kernels.
    """
    inside = torch.zeros_like(maps[:, :1], dtype=torch.bool)
    for image, (height, width) in zip(inside, sizes):
        image[:, :height, :width] = True
    return inside


def as_float(x: Tensor) -> Tensor:
    """x in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        (Tensor, Tensor): (N, C, H, W) each, in float32; float64 stays.
    """
    check_options(normalize, normalize_scope)
    student, teacher = as_float(student), as_float(teacher)
    if normalize == "none":
        return student, teacher
    dims = SCOPES[normalize_scope]
    if normalize == "standardize":
        return _standardize(student, dims, inside), _standardize(teacher, dims, inside)
    low_t, width_t = _range(teacher, dims, inside)
    low_s, width_s = _range(student, dims, inside) if normalize == "minmax" else (low_t, width_t)
    return (
        (student - low_s) * inverse_width(width_s),
        (teacher - low_t) * inverse_width(width_t),
    )


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
    return (x - mean) * inverse_width(torch.where(flat, torch.zeros_like(variance), deviation))


def inverse_width(width: Tensor) -> Tensor:
    """1 / width; 0 for a flat map, whose width is next to nothing."""
    return torch.where(width > TINY, 1 / width.clamp_min(TINY), torch.zeros_like(width))
