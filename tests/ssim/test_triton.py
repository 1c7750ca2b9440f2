import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ssimkd.ssim import gpu

needs_triton = pytest.mark.skipif(gpu.triton is None, reason="there is no Triton here")
INTERPRETED = Path(__file__).with_name("interpret_triton.py")
OPTIONS = dict(
    window_size=11,
    sigma=1.5,
    k1=0.01,
    k2=0.03,
    data_range=1.0,
    exponents=(1, 1, 1),
    border="renormalize",
)


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
def test_the_loss_in_the_interpreter():
    run = child("-m", "pytest", str(INTERPRETED), "--timeout", "300", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


# --- compiled without a GPU ---

KINDS = {
    **dict.fromkeys(["affine", "slopes", "sums", "gradient"], "*fp32"),
    **dict.fromkeys(["x_map", "x_row", "y_map", "y_row", "gradient_map", "gradient_row"], "i32"),
    **dict.fromkeys(["height", "width", "strips", "chunks", "rows"], "i32"),
    **dict.fromkeys(["c1", "c2", "factor"], "fp32"),
}


def compile_for(capability, kernel, dtype, window_size, **constants):
    """PTX of a kernel and what ptxas says about it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    weights = gpu.gaussian_weights({**OPTIONS, "window_size": window_size})
    constants.update(weights=weights, radius=window_size // 2, block=64)
    kinds = {**KINDS, "x": f"*{dtype}", "y": f"*{dtype}", **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds[name] for name in kernel.arg_names}
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
    flags = dict(renormalize=True, luminance=True, with_slopes=True)
    kernels = gpu.triton_kernels.forward_kernel, gpu.triton_kernels.backward_kernel
    for kernel, constants in zip(kernels, (flags, {})):
        ptx, report = compile_for(capability, kernel, dtype, gpu.MAX_WINDOW, **constants)
        registers, spilled = (
            int(re.search(pattern, report)[1])
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
        )
        assert registers <= 128  # sixteen warps on each multiprocessor
        assert spilled <= 16  # at most what is stored once, before the rows
        assert not re.search(r"\b(atom|red)\.|f64", ptx)


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
@pytest.mark.parametrize("window_size", [1, 11])
def test_a_kernel_compiles_once_for_all_sizes(window_size, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launchers = []
    for name in ("forward_kernel", "backward_kernel"):
        kernel = getattr(gpu.triton_kernels, name)
        monkeypatch.setattr(kernel, "device_caches", kernel.device_caches)
        launchers.append(Launcher(kernel))
        monkeypatch.setattr(gpu.triton_kernels, name, launchers[-1])
    stub = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", stub)
    options = {**OPTIONS, "window_size": window_size}
    for shape in ((1, 1, 1), (6, 13, 21), (16, 9, 14), (2, 20, 33), (2, 1, 64)):
        x, gradient = torch.zeros(2, *shape)
        gpu.kernel(x, x, torch.ones(6, shape[0]), options, gradient, 1.0)
    # one for strips of 32 columns and one for 64
    assert [len(x.binaries) for x in launchers] == [2, 2]
    gpu.kernel(x, x, torch.ones(6, shape[0]), options, None, 1.0)  # without slopes
    assert [len(x.binaries) for x in launchers] == [3, 2]


# --- when it is used ---


def on_a_gpu(dtype=torch.float32):
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda"))


def test_covers_only_what_the_kernels_support(monkeypatch):
    monkeypatch.setattr(gpu, "passes_self_test", lambda *kind: True)
    monkeypatch.setattr(gpu, "triton", gpu.triton or object())
    maps, double = on_a_gpu(), on_a_gpu(torch.float64)

    def covers(student=maps, teacher=maps, **options):
        return gpu.covers(student, teacher, {**OPTIONS, **options})

    assert covers() and covers(border="zero") and covers(exponents=(0, 1, 1))
    assert covers(teacher=on_a_gpu(torch.bfloat16))
    assert not covers(torch.zeros(1, 1, 2, 2))
    assert not covers(double) and not covers(teacher=double)
    assert not covers(border="reflect") and not covers(window_size=13)
    assert not covers(exponents=(1, 1, 2))
    monkeypatch.setattr(gpu, "triton", None)
    assert not covers()


@pytest.fixture
def failing(monkeypatch):
    """A function that makes the kernel raise and puts it to its trial."""

    def try_kernel(error):
        def kernel(*args):
            raise error

        monkeypatch.setattr(gpu, "kernel", kernel)
        kind = torch.device("cpu"), torch.float32, torch.float32, tuple(OPTIONS.items())
        return gpu.passes_self_test(*kind)

    gpu.passes_self_test.cache_clear()
    yield try_kernel
    gpu.passes_self_test.cache_clear()


@needs_triton
def test_a_compiler_that_fails_is_named_once(failing, caplog):
    error = RuntimeError("Failed to find C compiler\nand a long trace")
    assert not failing(error) and not failing(error)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "failed their trial on cpu (RuntimeError: Failed to find" in record.getMessage()
    assert "long trace" not in record.getMessage()


@needs_triton
def test_an_error_after_which_the_device_fails_is_raised_with_the_setting_that_avoids_it(
    failing, monkeypatch
):
    error = RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
    assert not failing(error)  # the device still computes
    gpu.passes_self_test.cache_clear()
    monkeypatch.setattr(gpu, "works", lambda device: False)
    with pytest.raises(RuntimeError, match=r"MODEL.DISTILL.SSIM.BACKEND analytic.*CUDA"):
        failing(error)


@needs_triton
@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), TypeError()])
def test_other_errors_are_raised_as_they_are(failing, error):
    with pytest.raises(type(error)) as found:
        failing(error)
    assert found.value is error


def test_without_triton_the_module_still_imports():
    code = "import sys; sys.modules['triton'] = None; from ssimkd.ssim.gpu import triton, covers\n"
    code += "assert triton is None and not covers(None, None, {})"
    run = child("-c", code)
    assert run.returncode == 0, run.stderr
