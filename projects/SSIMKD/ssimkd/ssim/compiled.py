"""The kernel of `one_pass.py` for CPUs in C++, built by the machine's own compiler.

A process builds it once, at its first use, for the processor that it runs on, in a folder of its
own. That takes about a second, and nothing is left behind or taken from elsewhere.
"""

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import window_matrices

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-funroll-loops", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
LANES = 16  # of the source
logger = logging.getLogger(__name__)


def covers(student: Tensor, teacher: Tensor, options: Dict[str, Any]) -> bool:
    """Whether :func:`kernel` supports such maps and options, and can be built here."""
    return (
        student.device.type == "cpu"
        and torch.float64 not in (student.dtype, teacher.dtype)
        and options["border"] != "zero"  # a map about its level would have another border
        and options["exponents"] == (1, 1, 1)
        and library() is not None
    )


def kernel(
    x: Tensor,
    y: Tensor,
    affine: Tensor,
    options: Dict[str, Any],
    gradient: Optional[Tensor],
    factor: float,
) -> Tensor:
    """See the head of `one_pass.py`. The threads of torch share the maps."""
    run, (count, *size), threads = library(), x.shape, torch.get_num_threads()
    assert run is not None  # covers() has built it
    rows, columns = _axes(*size, options["window_size"], options["sigma"], options["border"])
    cells = rows.described.results * columns.described.results
    constants = [(options[k] * options["data_range"]) ** 2 for k in ("k1", "k2")]
    x, y, affine = x.float(), y.float(), affine.t().contiguous()  # kept: the library has pointers
    sums = torch.empty(count, 3, dtype=torch.float64, device="cpu")
    maps = [_Maps(m) for m in (x, y, gradient)]
    numbers = affine.data_ptr(), *constants, factor / cells, sums.data_ptr()

    def part(first: int) -> None:
        last = min(first + step, count)
        run(*maps, first, last, rows.described, columns.described, *numbers)

    step = -(-count // threads)
    if step == count:
        part(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, range(0, count, step)))
    return sums.t() / cells


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


@lru_cache(maxsize=128)
def _axes(*window):
    return [axis_of(matrix) for matrix in window_matrices(*window)]


def axis_of(matrix: Tensor) -> Axis:
    """The window along an axis whose averages are those of a banded matrix (results, cells)."""
    results, cells = matrix.nonzero().unbind(1)
    before, after = (max(0, int(d.max())) for d in (results - cells, cells - results))
    weights, adjoint = _diagonals(matrix, before, after), _diagonals(matrix.t(), after, before)
    sizes = (matrix.shape[1], matrix.shape[0], before + 1 + after, before)
    return Axis(_Axis(*sizes, weights.data_ptr(), adjoint.data_ptr()), weights, adjoint)


def _diagonals(matrix: Tensor, before: int, after: int) -> Tensor:
    """The diagonals of a banded matrix as rows; zeros make each row a number of whole vectors."""
    rows = len(matrix)
    matrix = F.pad(matrix, (before, after + rows))
    diagonals = torch.stack([matrix.diagonal(k)[:rows] for k in range(before + 1 + after)])
    return F.pad(diagonals, (0, -rows % LANES)).float().contiguous()


@cache
def library() -> Optional[Callable[..., None]]:
    """The compiled function; None, and a warning in the log, where it cannot be built."""
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
        text = (getattr(error, "stderr", None) or f"{type(error).__name__}: {error}").strip()
        logger.warning(
            "The compiler %s could not build the C++ form of the SSIM loss (%s). PyTorch's own "
            "operators compute the loss instead, which is slower",
            compiler,
            text.splitlines()[0],
        )
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    maps, axes, floats = [_Maps] * 3, [_Axis] * 2, [ctypes.c_float] * 3
    run.argtypes = [*maps, number, number, *axes, pointer, *floats, pointer]
    run.restype = None
    return run
