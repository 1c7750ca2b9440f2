"""`ssim_loss`, the one function that everybody calls, and the choice of what computes it."""

from functools import partial
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import analytic, compiled, gpu
from .definition import check_options as check_similarity_options
from .definition import ssim_map
from .normalize import NORMALIZATIONS, inside_of, normalize_maps
from .normalize import check_options as check_normalization

BACKENDS = ("auto", "definition", "analytic", "cpp", "triton")


def check_options(normalize: str, normalize_scope: str, backend: str, **options) -> None:
    """Raises ValueError, naming the option, where one is out of its range."""
    check_normalization(normalize, normalize_scope)
    check_similarity_options(**options)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def ssim_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    sizes: Optional[Sequence[Tuple[int, int]]] = None,
    normalize: str = "none",
    normalize_scope: str = "channel",
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    data_range: Optional[float] = None,
    exponents: Sequence[float] = (1.0, 1.0, 1.0),
    border: str = "renormalize",
    teacher_gradient: bool = False,
    backend: str = "auto",
) -> Tensor:
    """(1 - SSIM) / 2 of normalised maps, averaged over cells, channels and images.

    Each image counts the same, however many cells it covers.

    Args:
        student (Tensor): (N, C, H, W), gradient flows.
        teacher (Tensor): (N, C, H, W), treated as constant unless `teacher_gradient`.
        sizes (list[(int, int)]): height and width, in cells, of what each image covers of its maps;
            the other cells only pad it and may hold anything. None: every cell.
        normalize, normalize_scope (str): how both maps are normalised first; see `normalize.py`.
        window_size, sigma, k1, k2, exponents, border: see :func:`ssim_map`.
        data_range (float): L, in units of the normalised maps; None: the normalisation's own.
        teacher_gradient (bool): let gradient flow to the teacher as well.
        backend (str): "auto", or the one to use.

    Returns:
        Tensor: scalar in [0, 1]; 0 for equal maps. float32; float64 for maps in float64.

    Raises:
        ValueError: shapes differ, an option is out of its range, or the backend lacks it.
    """
    options = dict(
        window_size=window_size,
        sigma=sigma,
        k1=k1,
        k2=k2,
        data_range=NORMALIZATIONS.get(normalize) if data_range is None else data_range,
        exponents=tuple(exponents),
        border=border,
    )
    check_options(normalize, normalize_scope, backend, **options)
    cells = [tuple(student.shape[2:])] * len(student) if sizes is None else list(sizes)
    reference = partial(
        _by_definition,
        cells=cells,
        normalize=normalize,
        scope=normalize_scope,
        teacher_gradient=teacher_gradient,
        **options,
    )
    if teacher_gradient or backend == "definition":
        return reference(student, teacher)
    maps = student, teacher
    if backend in ("auto", "triton") and gpu.covers(*maps, normalize, **options):
        return gpu.ssim_loss(*maps, cells, normalize, normalize_scope, **options)
    if analytic.covers(*maps, normalize, **options):
        use_cpp = backend in ("auto", "cpp") and compiled.library() is not None
        return analytic.ssim_loss(
            *maps, cells, normalize, normalize_scope, reference, use_cpp, **options
        )
    return reference(*maps)


def _by_definition(
    student, teacher, cells, normalize, scope, teacher_gradient, **options
) -> Tensor:
    whole = all(size == tuple(student.shape[2:]) for size in cells)
    inside = None
    if not whole:
        inside = inside_of(torch.tensor(cells, device=student.device), student)
    s, t = normalize_maps(student, teacher, normalize, scope, inside)
    losses: List[Tensor] = []
    for i, (h, w) in enumerate(cells):
        maps = (m[i : i + 1, :, :h, :w] for m in (s, t))
        similarity = ssim_map(*maps, **options, teacher_gradient=teacher_gradient)
        losses.append((1 - similarity.mean()) / 2)
    return torch.stack(losses).mean()
