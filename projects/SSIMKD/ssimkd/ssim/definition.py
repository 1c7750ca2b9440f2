"""Structural similarity of feature maps: torch only, nothing of Detectron2.

    symbol      name                      equation
    x, y        student and teacher map   (N, C, H, W), C channels of H x W cells
    mu_x        local mean                B[x], the average under a Gaussian window
    var_x       local variance            B[x^2] - mu_x^2, its root is sd_x
    cov_xy      local covariance          B[x y] - mu_x mu_y
    l           luminance                 (2 mu_x mu_y + C1) / (mu_x^2 + mu_y^2 + C1)
    c           contrast                  (2 sd_x sd_y + C2) / (var_x + var_y + C2)
    s           structure                 (cov_xy + C3) / (sd_x sd_y + C3), C3 = C2 / 2
    SSIM        structural similarity     l^alpha c^beta s^gamma

Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP
2004, equations 6, 9, 10 and 12; used on feature maps by de Rijk et al., "Structural Knowledge
Distillation for Object Detection", NeurIPS 2022.
"""

import math
from typing import Tuple

import torch
from torch import Tensor

from .window import BORDERS, Window


def ssim_map(
    student: Tensor,
    teacher: Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    data_range: float = 1.0,
    exponents: Tuple[float, float, float] = (1.0, 1.0, 1.0),
    border: str = "renormalize",
) -> Tensor:
    """Local structural similarity, in float32 also under autocast; float64 stays float64.

    Args:
        student (Tensor): (N, C, H, W), gradient flows.
        teacher (Tensor): (N, C, H, W), treated as constant.
        window_size (int): side of the window in cells, odd. A map smaller than the window is no
            error: "renormalize" and "zero" take it as it is, "reflect" and "valid" shrink the
            window, along each axis, to the largest odd size that the map allows.
        sigma (float): standard deviation of the Gaussian window, in cells.
        k1, k2 (float): C1 = (k1 L)^2 and C2 = (k2 L)^2, both > 0.
        data_range (float): L, in feature units.
        exponents (tuple[float]): alpha, beta, gamma of l, c, s; all >= 0. A negative l or s keeps
            its sign under an exponent other than 1.
        border (str): what a window that reaches over the edge sees. "renormalize": its part inside,
            weights scaled to 1; "reflect": the map mirrored at its edge cell; "zero": zeros;
            "valid": there is no such window, the result is smaller.

    Returns:
        Tensor: (N, C, H, W) in [-1, 1], 1 where the local statistics agree. With border "valid"
        (N, C, H - window + 1, W - window + 1).

    Raises:
        ValueError: shapes differ or are not 4-D, no cells, or an option is out of its range.
    """
    check_shapes(student, teacher)
    check_options(window_size, sigma, k1, k2, data_range, exponents, border)
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, torch.float32)
        x, y = student.to(dtype), teacher.detach().to(dtype)
        c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
        window = Window(x.shape[-2:], window_size, sigma, border, x)
        x, y = window.pad(x), window.pad(y)
        # Local (co)variances do not change when a map is shifted, but their rounding does:
        # E[x^2] - E[x]^2 cancels where the mean is large.
        shift_x = x.detach().mean(dim=(2, 3), keepdim=True)
        shift_y = y.detach().mean(dim=(2, 3), keepdim=True)
        x, y = x - shift_x, y - shift_y
        mu_x, mu_y, var_sum, cov_xy, var_product = _local_statistics(x, y, window, exponents)
        return _combine(
            mu_x + shift_x, mu_y + shift_y, var_sum, cov_xy, var_product, c1, c2, exponents
        )


def check_shapes(student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError unless both are (N, C, H, W) and hold cells."""
    if student.shape != teacher.shape or student.dim() != 4 or student.numel() == 0:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"expected two equal, non-empty shapes (N, C, H, W), got {shapes}")


def check_options(window_size, sigma, k1, k2, data_range, exponents, border) -> None:
    """Raises ValueError, naming the option, where one is out of its range."""
    if not (isinstance(window_size, int) and window_size > 0 and window_size % 2 == 1):
        raise ValueError(f"window_size must be an odd, positive integer, got {window_size!r}")
    for name, value in dict(sigma=sigma, k1=k1, k2=k2, data_range=data_range).items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    if len(exponents) != 3 or not all(0 <= e < math.inf for e in exponents):
        raise ValueError(f"exponents must be three numbers >= 0 (of l, c, s), got {exponents!r}")
    if border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(BORDERS)}, got {border!r}")


def _local_statistics(x, y, window, exponents):
    """mu_x, mu_y, var_x + var_y, cov_xy and, only where needed, var_x var_y; each (N, C, H, W)."""
    _, beta, gamma = exponents
    mu_x, mu_y = window.average(x), window.average(y)
    cov_xy = window.average(x * y) - mu_x * mu_y
    if beta == gamma:  # c s = (2 cov_xy + C2) / (var_x + var_y + C2): one average and no root
        var_sum = (window.average(x * x + y * y) - mu_x * mu_x - mu_y * mu_y).clamp_min(0)
        return mu_x, mu_y, var_sum, cov_xy, None
    var_x = (window.average(x * x) - mu_x * mu_x).clamp_min(0)
    var_y = (window.average(y * y) - mu_y * mu_y).clamp_min(0)
    return mu_x, mu_y, var_x + var_y, cov_xy, var_x * var_y


def _combine(mu_x, mu_y, var_sum, cov_xy, var_product, c1, c2, exponents) -> Tensor:
    """l^alpha c^beta s^gamma from the local statistics."""
    alpha, beta, gamma = exponents
    luminance = (2 * mu_x * mu_y + c1) / (mu_x * mu_x + mu_y * mu_y + c1)
    if beta == gamma:
        cov_xy = cov_xy.clamp(-var_sum / 2, var_sum / 2)  # it lies there but for rounding
        contrast_structure = (2 * cov_xy + c2) / (var_sum + c2)
        return _signed_power(luminance, alpha) * _signed_power(contrast_structure, beta)
    sd_product = _root(var_product)
    cov_xy = cov_xy.clamp(-sd_product, sd_product)
    contrast = (2 * sd_product + c2) / (var_sum + c2)
    structure = (cov_xy + c2 / 2) / (sd_product + c2 / 2)
    contrast_structure = _signed_power(contrast, beta) * _signed_power(structure, gamma)
    return _signed_power(luminance, alpha) * contrast_structure


def _root(x: Tensor) -> Tensor:
    """sqrt(x) with slope 0, not infinity, at x = 0: a flat window has no deviation to change."""
    flat = x <= 0
    return torch.where(flat, x.new_zeros(()), torch.where(flat, x.new_ones(()), x).sqrt())


def _signed_power(x: Tensor, exponent: float) -> Tensor:
    """sign(x) |x|^exponent, with a finite slope at 0; 1 for exponent 0."""
    if exponent == 0:
        return torch.ones_like(x)
    return x if exponent == 1 else x.sign() * x.abs().clamp_min(1e-6) ** exponent
