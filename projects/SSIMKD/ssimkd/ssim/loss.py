"""`ssim_loss`, the public function, and the choice of the backend that computes it."""

from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import analytic, compiled, gpu, one_pass
from .definition import check_options as check_similarity_options
from .definition import check_shapes, ssim_map
from .normalize import NORMALIZATIONS, as_float, inside_of, normalize_maps
from .normalize import check_options as check_normalization

# The fast ones, in the order in which "auto" tries them
FAST = {"triton": gpu, "cpp": compiled, "analytic": analytic}
BACKENDS = ("auto", "definition", *FAST)


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
    backend: str = "auto",
) -> Tensor:
    """(1 - SSIM) / 2 of normalised maps, averaged over cells, channels and images.

    Each image counts the same, however many cells it covers. All backends compute the same loss:

        backend       runs on       supports
        definition    any device    everything: `normalize.py` and `definition.py` by autograd
        analytic      any device    normalize "minmax", "teacher_range", "none"; border
                                    "renormalize", "reflect", "valid"; exponents 1
        cpp           CPU           the same, not float64; it needs a C++ compiler
        triton        CUDA          the same normalisations, not float64; border "renormalize",
                                    "zero"; exponents 1, the first may be 0; windows up to 11

    "auto" takes the fastest that supports the maps and options. The fast backends form the gradient
    in the forward. A second backward or a second derivative of theirs goes through the definition,
    as long as the caller keeps the teacher's maps.

    Args:
        student (Tensor): (N, C, H, W), gradient flows, also through its normalisation.
        teacher (Tensor): (N, C, H, W), treated as constant.
        sizes (list[(int, int)]): height and width, in cells, of what each image covers of its maps.
            The other cells only pad it and may hold anything. None: every cell.
        normalize, normalize_scope (str): how both maps are normalised first; see `normalize.py`.
        window_size, sigma, k1, k2, exponents, border: see :func:`ssim_map`.
        data_range (float): L, in units of the normalised maps; None: the normalisation's own.
        backend (str): one of BACKENDS.

    Returns:
        Tensor: scalar in [0, 1], 0 for equal maps. float32; float64 for maps in float64.

    Raises:
        ValueError: shapes differ, an option is out of its range, or the backend does not support
            these maps and options.
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
    check_shapes(student, teacher)
    sizes = _checked_sizes(sizes, student)
    how = normalize, normalize_scope, options
    by_definition = partial(_by_definition, sizes, *how)
    backend = _choose(backend, student, teacher, normalize, options)
    if backend == "definition":
        return by_definition(student, teacher)
    kernel = FAST[backend].kernel
    return one_pass.one_pass_loss(student, teacher, sizes, *how, kernel, by_definition)


def check_options(normalize: str, normalize_scope: str, backend: str, **options: Any) -> None:
    """Raises ValueError, naming the option, where one is out of its range."""
    check_normalization(normalize, normalize_scope)
    check_similarity_options(**options)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _checked_sizes(sizes, student: Tensor) -> List[Tuple[int, int]]:
    height, width = student.shape[2:]
    if sizes is None:
        return [(height, width)] * len(student)
    if len(sizes) != len(student) or not all(0 < h <= height and 0 < w <= width for h, w in sizes):
        raise ValueError(
            f"sizes must be the height and width, within {height} x {width} cells, of each of "
            f"{len(student)} images, got {sizes!r}"
        )
    return [(int(h), int(w)) for h, w in sizes]


def _choose(backend, student, teacher, normalize, options) -> str:
    """The backend that computes the loss of such maps."""

    def supports(name: str) -> bool:
        return one_pass.covers(student, teacher, normalize) and FAST[name].covers(
            student, teacher, options
        )

    if backend == "auto":
        if student.dtype == torch.float64:
            return "definition"
        return next((name for name in FAST if supports(name)), "definition")
    if backend != "definition" and not supports(backend):
        raise ValueError(
            f"backend {backend!r} does not compute the SSIM loss of {student.dtype} maps on "
            f"{student.device} with normalize {normalize!r}, border {options['border']!r}, "
            f"exponents {options['exponents']} and window_size {options['window_size']} here; "
            "'auto' takes one that does"
        )
    return backend


def _by_definition(
    sizes: List[Tuple[int, int]],
    normalize: str,
    normalize_scope: str,
    options: Dict[str, Any],
    student: Tensor,
    teacher: Tensor,
) -> Tensor:
    """The loss as it is defined: each image's maps are normalised, cut out and compared."""
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = as_float(student), as_float(teacher.detach())
        inside = None
        if any(size != tuple(student.shape[2:]) for size in sizes):
            inside = inside_of(sizes, student)
        maps = normalize_maps(student, teacher, normalize, normalize_scope, inside)
        losses = []
        for image, (h, w) in enumerate(sizes):
            s, t = (m[image : image + 1, :, :h, :w] for m in maps)
            similarity = ssim_map(s, t, **options)
            losses.append((1 - similarity.mean()) / 2)
        return torch.stack(losses).mean()
