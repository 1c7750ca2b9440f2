"""The inner part of `ssim_fast.py` in C++, built by the machine's own compiler.

A process builds it once, when first asked for it, for the processor that it runs on, in a folder of
its own: about a second, and nothing is left behind or taken from elsewhere.
"""

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ssimkd.errors import one_line

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-funroll-loops", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
LANES = 16  # of the source
logger = logging.getLogger(__name__)


class _Maps(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("map", ctypes.c_int64), ("row", ctypes.c_int64)]

    def __init__(self, maps: Optional[Tensor]) -> None:
        super().__init__(*(() if maps is None else (maps.data_ptr(), *maps.stride()[:2])))


class _Axis(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("cells", "results", "taps", "before")]
    _fields_ += [("weights", ctypes.c_void_p), ("adjoint", ctypes.c_void_p)]


class Axis(NamedTuple):
    """A window along one axis, as the library takes it, and the memory that it points to."""

    described: _Axis
    weights: Tensor
    adjoint: Tensor


def axis_of(matrix: Tensor) -> Axis:
    """Of the banded matrix (results, cells) that averages along an axis."""
    results, cells = matrix.nonzero().unbind(1)
    before, after = (max(0, int(d.max())) for d in (results - cells, cells - results))
    weights, adjoint = _diagonals(matrix, before, after), _diagonals(matrix.t(), after, before)
    sizes = (matrix.shape[1], matrix.shape[0], before + 1 + after, before)
    return Axis(_Axis(*sizes, weights.data_ptr(), adjoint.data_ptr()), weights, adjoint)


def _diagonals(matrix, before, after):
    """Those of a banded matrix as rows, 0 where it ends, up to whole vectors."""
    rows = len(matrix)
    matrix = F.pad(matrix, (before, after + rows))
    diagonals = torch.stack([matrix.diagonal(k)[:rows] for k in range(before + 1 + after)])
    return F.pad(diagonals, (0, -rows % LANES)).float().contiguous()


def compare(
    run: Callable[..., None],
    student: Tensor,
    teacher: Tensor,
    affine: Tensor,
    rows: Axis,
    columns: Axis,
    constants: tuple,
    gradient: Optional[Tensor],
    factor: float,
) -> Tensor:
    """SSIM of maps, and its gradient.

    Args:
        run (callable): see :func:`library`.
        student, teacher (Tensor): (maps, H, W), float32, cells of a row side by side.
        affine (Tensor): (maps, 6); mean, scale of the student's maps, of the teacher's, and what
            brings x' and v' back to x and v.
        rows, columns (Axis): the window.
        constants (tuple[float]): C1, C2.
        gradient (Tensor or None): (maps, H, W), is filled with d sum(SSIM) / d student
            times factor / 4.
        factor (float): see above.

    Returns:
        Tensor: (3, maps), float64: sums over each map of SSIM and, with a gradient, of the slope
        d SSIM / dx' / 4 and of slope times x'.
    """
    count, threads = len(student), torch.get_num_threads()
    affine = affine.contiguous()
    sums = torch.empty(count, 3, dtype=torch.float64, device=affine.device)
    maps = [_Maps(m) for m in (student, teacher, gradient)]
    rest = (rows.described, columns.described, affine.data_ptr(), *constants, factor)

    def part(first: int) -> None:
        run(*maps, first, min(first + step, count), *rest, sums.data_ptr())

    step = -(-count // threads)
    if step == count:
        part(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, range(0, count, step)))
    return sums.t()


@cache
def library() -> Optional[Callable[..., None]]:
    """The compiled function; None, and a line in the log, where it cannot be built."""
    compiler = os.environ.get("CXX") or "c++"
    try:
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder, "ssim.so"))
            command = [*shlex.split(compiler), *FLAGS, str(SOURCE), "-o", target]
            subprocess.run(  # its messages may be in any encoding
                command, check=True, capture_output=True, text=True, errors="replace", timeout=120
            )
            run = ctypes.CDLL(target).ssim
    except (OSError, subprocess.SubprocessError, ValueError, AttributeError) as error:
        logger.info(
            "MODEL.DISTILL.SSIM.COMPILE: %s built nothing (%s), so that PyTorch's own operators "
            "do the work: right, but slower",
            compiler,
            (getattr(error, "stderr", None) or one_line(error)).splitlines()[0],
        )
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    maps, axes, floats = [_Maps] * 3, [_Axis] * 2, [ctypes.c_float] * 3
    run.argtypes = [*maps, number, number, *axes, pointer, *floats, pointer]
    run.restype = None
    return run
