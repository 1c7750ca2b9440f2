"""The paper's loss: structural similarity of normalised maps."""

from functools import partial
from typing import Any, Dict, Sequence

from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.ssim import analytic as ssim_fast
from ssimkd.ssim import definition as ssim
from ssimkd.ssim import gpu as ssim_gpu
from ssimkd.ssim.normalize import NORMALIZATIONS
from ssimkd.utils.validate import check_switches

from .base import Context, MapLoss


@register_loss("ssim")
class SSIMLoss(MapLoss):
    """(1 - SSIM) / 2 per level (de Rijk et al., NeurIPS 2022; SSIM of Wang et al., 2004).

    Args:
        weight (float): lambda.
        normalize, normalize_scope (str): see `normalize.py`; SSIM's dynamic range L follows.
        border, window_size, sigma, k1, k2, exponents: see :func:`ssimkd.ssim.ssim_map`.
        fast (bool): use a faster form of the same loss where there is one; see `ssim_fast.py` (CPU)
            and `ssim_gpu.py`. False: by autograd, as `ssim.py` writes it.
        compile (bool): the one for CPUs in C++, where there is a compiler; see `ssim_compiled.py`.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        weight: float = 4.0,  # [paper: 2 or 4; shapes: 64 and more, with clipped gradients]
        # [paper]; "teacher_range" is as good, "standardize" and "none" worse [shapes: normalize]
        normalize: str = "minmax",
        # not known from the paper; "image" is as good, "batch" is worse [shapes: scope]
        normalize_scope: str = "channel",
        border: str = "renormalize",  # the others are as good [shapes: border]
        window_size: int = 11,  # [paper]; 3 to 15 are as good [shapes: window]
        sigma: float = 1.5,  # [paper]; 0.5 to 3 are as good [shapes: sigma]
        k1: float = 0.01,  # [paper]
        k2: float = 0.03,  # [paper]
        # [paper]; most of the loss's effect comes from the last one [shapes: components]
        exponents: Sequence[float] = (1.0, 1.0, 1.0),
        fast: bool = True,
        compile: bool = True,
    ) -> None:
        super().__init__(weight, normalize, normalize_scope)
        check_switches(fast=fast, compile=compile)
        self.fast, self.compiled = fast, compile
        self.options: Dict[str, Any] = dict(
            window_size=window_size,
            sigma=sigma,
            k1=k1,
            k2=k2,
            data_range=NORMALIZATIONS[normalize],
            exponents=tuple(exponents),
            border=border,
        )
        ssim.check_options(**self.options)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar in [0, 1] for (n, C, h, w) maps."""
        return ssim.ssim_loss(student, teacher, **self.options)

    def compare_level(
        self, level: str, student: Tensor, teacher: Tensor, context: Context
    ) -> Tensor:
        """As in :class:`MapLoss`; for most settings, the same in a faster form."""
        reference = partial(super().compare_level, level, context=context)
        maps, cells = (student, teacher), context.cells(level, student)
        kind, scope = self.normalize, self.normalize_scope
        if self.fast and ssim_gpu.covers(*maps, kind, **self.options):
            return ssim_gpu.ssim_loss(*maps, cells, kind, scope, **self.options)
        if self.fast and ssim_fast.covers(*maps, kind, **self.options):
            return ssim_fast.ssim_loss(
                *maps, cells, kind, scope, reference, self.compiled, **self.options
            )
        return reference(*maps)
