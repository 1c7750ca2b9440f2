import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ssimkd.losses import Context, SSIMLoss
from ssimkd.ssim import gpu as ssim_gpu
from ssimkd.ssim import triton_loss as ssim_triton
from test_ssim_triton import child, needs_triton

INTERPRETED = Path(__file__).with_name("interpret_ssim_gpu.py")


@needs_triton
@pytest.mark.timeout(600)
def test_the_loss_on_a_gpu_in_the_interpreter():
    run = child("-m", "pytest", str(INTERPRETED), "--timeout", "300", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_maps_on_a_cpu_are_not_its():
    maps, options = torch.rand(1, 2, 5, 6), SSIMLoss().options
    assert not ssim_gpu.covers(maps, maps, "minmax", **options)


@pytest.fixture
def broken(monkeypatch):
    """CPU maps are taken for a GPU's, whose kernels cannot even be launched."""
    monkeypatch.setattr(ssim_gpu, "available", lambda maps, **options: True)

    def launch(*args, **options):
        raise ModuleNotFoundError("no GPU\nand a long trace")

    monkeypatch.setattr(ssim_gpu, "ssim_loss_triton", launch)
    ssim_gpu._trial.cache_clear()
    yield
    ssim_gpu._trial.cache_clear()


def test_kernels_that_cannot_run_are_named_once_and_autograd_does_the_work(broken, caplog):
    student, teacher = torch.rand(2, 2, 3, 9, 10)
    context = Context([(9, 10)] * 2, {"p0": 1})
    values = [
        loss({"p0": student}, {"p0": teacher}, context)["p0"]
        for loss in (SSIMLoss(), SSIMLoss(), SSIMLoss(backend="definition"))
    ]
    torch.testing.assert_close(values[0], values[2])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "failed their trial on cpu (ModuleNotFoundError: no GPU)" in record.getMessage()
    assert "benchmarks/gpu_check.py" in record.getMessage()


def test_the_switch_keeps_the_kernels_from_their_trial(broken, caplog):
    maps = torch.rand(2, 2, 3, 9, 10)
    context = Context([(9, 10)] * 2, {"p0": 1})
    SSIMLoss(backend="definition")({"p0": maps[0]}, {"p0": maps[1]}, context)
    assert not caplog.records


@pytest.mark.parametrize(
    ("normalize", "options", "covered"),
    [
        ("minmax", {}, True),
        ("standardize", {}, False),
        ("none", {"border": "valid"}, False),
        ("none", {"exponents": (1.0, 2.0, 1.0)}, False),
    ],
)
def test_what_the_kernels_do_not_know_goes_elsewhere(normalize, options, covered, monkeypatch):
    def available(maps, **options):
        return ssim_triton.available(SimpleNamespace(is_cuda=True, dtype=maps.dtype), **options)

    monkeypatch.setattr(ssim_gpu, "available", available)
    monkeypatch.setattr(ssim_gpu, "trusted", lambda *kind: True)
    monkeypatch.setattr(ssim_triton, "triton", ssim_triton.triton or object())
    maps, loss = torch.rand(1, 2, 5, 6), SSIMLoss(normalize=normalize, **options)
    assert ssim_gpu.covers(maps, maps, normalize, **loss.options) == covered
    assert not ssim_gpu.covers(maps, maps[..., :5], normalize, **loss.options)
    assert not ssim_gpu.covers(maps.double(), maps, normalize, **loss.options)
