import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ssimkd.ssim import triton_loss as ssim_triton
from ssimkd.ssim.triton_loss import available, ssim_loss_triton

needs_triton = pytest.mark.skipif(ssim_triton.triton is None, reason="there is no Triton here")
INTERPRETED = Path(__file__).with_name("interpret_ssim_triton.py")


def child(*arguments, **variables):
    """Runs Python in a process of its own; its output and what it returns."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


@needs_triton
@pytest.mark.timeout(600)
def test_kernels_against_float64_in_the_interpreter():
    run = child("-m", "pytest", str(INTERPRETED), "--timeout", "300", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


# --- compiled without a GPU ---

STRIDES = ["sn", "sc", "sh", "tn", "tc", "th"]
SIZES = ["channels", "height", "width", "strips", "chunks", "rows"]
COMMON = {
    "affine": "*fp32",
    "sizes": "*i64",
    "slopes": "*fp32",
    "upstream": "*fp32",
    "sums": "*fp32",
    "c1": "fp32",
    "c2": "fp32",
}


def compile_for(capability, kernel, dtype, window_size, **constants):
    """PTX of a kernel and what ptxas says about it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants.update(
        weights=tuple(ssim_triton._gaussian(window_size, 1.5)),
        radius=window_size // 2,
        block=64,
    )
    kinds = {
        **COMMON,
        **dict.fromkeys(STRIDES + SIZES, "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: kinds.get(name, f"*{dtype}") for name in kernel.arg_names}
    ptx = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 2},
    ).asm["ptx"]
    architecture = re.search(r"\.target (\w+)", ptx)[1]
    verbose = [triton.knobs.nvidia.ptxas.path, "-v", "-arch", architecture, "-o", os.devnull, "-"]
    return ptx, subprocess.run(verbose, input=ptx, capture_output=True, text=True).stderr


@needs_triton
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_fit_the_registers(capability, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = ssim_triton.ssim_kernels
    flags = dict(renormalize=True, luminance=True, with_slopes=True)
    for kernel, constants in ((kernels.forward_kernel, flags), (kernels.backward_kernel, {})):
        ptx, report = compile_for(capability, kernel, dtype, ssim_triton.MAX_WINDOW, **constants)
        registers, spilled = (
            int(re.search(pattern, report)[1])
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
        )
        assert registers <= 128  # sixteen warps on each multiprocessor
        assert spilled <= 16  # at most what is stored once, before the rows
        assert not re.search(r"\b(atom|red)\.|f64", ptx)


@needs_triton
@pytest.mark.parametrize("window_size", [1, 3, 7])
def test_kernels_of_other_options_compile(window_size, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = ssim_triton.ssim_kernels
    flags = dict(renormalize=False, luminance=False, with_slopes=False)
    for kernel, constants in ((kernels.forward_kernel, flags), (kernels.backward_kernel, {})):
        ptx, report = compile_for(90, kernel, "fp32", window_size, **constants)
        assert " 0 bytes spill stores" in report
        writes = 1 if kernel is kernels.forward_kernel else 4  # sums; gradient, its padding, 2 sums
        assert len(re.findall(r"\bst\.global", ptx)) >= writes


class Launcher:
    """Stands for a kernel: takes a launch as far as it goes without a GPU, to the binary."""

    def __init__(self, kernel):
        self.kernel, self.binaries = kernel, set()
        kernel.device_caches = defaultdict(kernel.create_binder)

    def __getitem__(self, grid):
        return lambda *args, **options: self.binaries.add(
            self.kernel.warmup(*args, grid=grid, **options)
        )


@needs_triton
def test_what_the_operators_launch_compiles_once_for_all_sizes(tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = ssim_triton.ssim_kernels
    launchers = []
    for name in ("forward_kernel", "backward_kernel"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernel, "device_caches", kernel.device_caches)
        launchers.append(Launcher(kernel))
        monkeypatch.setattr(kernels, name, launchers[-1])
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", gpu)
    for shape in ((1, 1, 1, 1), (2, 3, 13, 21), (1, 16, 9, 14), (2, 1, 20, 33), (1, 2, 1, 64)):
        student = torch.zeros(shape, requires_grad=True)
        affine = torch.zeros(shape[:2]), torch.ones(shape[:2])
        loss = ssim_loss_triton(student, torch.zeros(shape), affine, affine)
        torch.autograd.grad(loss.sum(), student)
    assert [len(x.binaries) for x in launchers] == [2, 2]  # one for strips of 32, one of 64


# --- what calls it ---


def test_available_only_for_what_the_kernels_know(monkeypatch):
    maps = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert available(maps) == (ssim_triton.triton is not None)
    assert available(maps, sigma=2.0, border="zero") == available(maps)
    assert not available(torch.zeros(1, 1, 2, 2))
    assert not available(SimpleNamespace(is_cuda=True, dtype=torch.float64))
    assert not available(maps, border="reflect")
    assert not available(maps, window_size=13)
    assert not available(maps, exponents=(1.0, 1.0, 2.0))
    monkeypatch.setattr(ssim_triton, "triton", None)
    assert not available(maps)


def test_without_triton_the_module_still_imports():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from ssimkd import ssim_triton; assert ssim_triton.triton is None"
    )
    run = child("-c", code)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(1, 2, 3, 4), (1, 2, 3, 5)], {}, r"\(1, 2, 3, 4\) and \(1, 2, 3, 5\)"),
        ([(1, 2, 0, 4)] * 2, {}, "non-empty"),
        ([(1, 2, 3, 4)] * 2, {"window_size": 13}, "window_size .* 13"),
        ([(1, 2, 3, 4)] * 2, {"window_size": 4}, "window_size .* 4"),
        ([(1, 2, 3, 4)] * 2, {"border": "valid"}, "border 'valid'"),
        ([(1, 2, 3, 4)] * 2, {"exponents": (1.0, 2.0, 1.0)}, "exponents"),
    ],
)
def test_what_it_does_not_take_is_named(shapes, options, message):
    affine = torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match=message):
        ssim_loss_triton(*map(torch.zeros, shapes), affine, affine, **options)


def test_the_window_is_the_one_of_the_reference():
    weights = ssim_triton._gaussian(5, 1.5)
    assert math.isclose(sum(weights), 1)
    expected = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * 1.5**2))
    torch.testing.assert_close(torch.tensor(weights), expected / expected.sum())
