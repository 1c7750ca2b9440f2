"""The SSIM loss of `ssim_gpu.py` on the CPU, in Triton's interpreter:
`TRITON_INTERPRET=1 pytest tests/interpret_ssim_gpu.py`, as test_ssim_gpu.py does."""

from types import SimpleNamespace

import pytest
import torch
from ssimkd.losses import Context, SSIMLoss
from ssimkd.ssim import analytic as ssim_fast
from ssimkd.ssim import gpu as ssim_gpu
from ssimkd.ssim import triton_loss as ssim_triton
from ssimkd.ssim.normalize import AFFINE, SCOPES

LEVEL, STRIDE = "p3", 8
CELLS = [(7, 6), (4, 6)]  # the second image is padded


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Takes CPU maps for a GPU's; the forms for CPUs must not be what answers."""

    def available(maps, **options):
        return ssim_triton.available(SimpleNamespace(is_cuda=True, dtype=maps.dtype), **options)

    monkeypatch.setattr(ssim_gpu, "available", available)
    monkeypatch.setattr(ssim_gpu, "TRIAL_SHAPE", (2, 1, 6, 5))
    monkeypatch.setattr(ssim_gpu, "TRIAL_CELLS", [(6, 5), (3, 4)])
    monkeypatch.setattr(ssim_fast, "covers", lambda *maps, **options: False)


def related_maps(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 2, 2, *CELLS[0], generator=generator)
    scale = torch.arange(1.0, 3.0).view(-1, 1, 1)
    return (scale * x + scale).to(dtype), (x + noise - scale).to(dtype)


def context_of(cells):
    return Context([(h * STRIDE, w * STRIDE) for h, w in cells], {LEVEL: STRIDE})


def evaluate(loss, student, teacher, context):
    student = student.detach().requires_grad_()
    value = loss({LEVEL: student}, {LEVEL: teacher}, context)[LEVEL]
    return value.detach(), torch.autograd.grad(value, student)[0]


def assert_equals_reference(loss, student, teacher, context, limit=2e-6):
    assert ssim_gpu.covers(student, teacher, loss.normalize, **loss.options)
    value, gradient = evaluate(loss, student, teacher, context)
    exact_value, exact = evaluate(loss, student.double(), teacher.double(), context)
    assert value.dtype == torch.float32 and gradient.dtype == student.dtype
    assert abs(value - exact_value) < 1e-6
    assert (gradient - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.parametrize("normalize", AFFINE)
@pytest.mark.parametrize("cells", [CELLS, [CELLS[0]] * 2], ids=["padded", "whole"])
def test_equals_autograd_for_every_normalisation(normalize, cells):
    loss = SSIMLoss(normalize=normalize, window_size=5)
    assert_equals_reference(loss, *related_maps(), context_of(cells))


@pytest.mark.parametrize("scope", SCOPES)
def test_equals_autograd_for_every_scope(scope):
    loss = SSIMLoss(normalize_scope=scope, window_size=3, border="zero")
    assert_equals_reference(loss, *related_maps(), context_of(CELLS))


def test_padding_gets_no_gradient_whatever_it_holds():
    student, teacher = related_maps()
    loss, context = SSIMLoss(window_size=3), context_of(CELLS)
    expected = evaluate(loss, student, teacher, context)
    for maps in (student, teacher):
        maps[1, :, 4:] = 1e6
    value, gradient = evaluate(loss, student, teacher, context)
    assert value == expected[0] and gradient.equal(expected[1])
    assert gradient[1, :, 4:].eq(0).all()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision(dtype, limit):
    loss = SSIMLoss(window_size=3)
    assert_equals_reference(loss, *related_maps(dtype=dtype), context_of(CELLS), limit)


def test_flat_maps_and_equal_bits():
    student, teacher = related_maps()
    student[0, 1], teacher[1, 0] = 0.7, -3.0
    loss, context = SSIMLoss(window_size=3), context_of(CELLS)
    assert_equals_reference(loss, student, teacher, context)
    first, second = (evaluate(loss, student, teacher, context) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_second_derivative_is_refused():
    student, teacher = related_maps()
    student.requires_grad_()
    loss = SSIMLoss(window_size=3, normalize="none")
    value = loss({LEVEL: student}, {LEVEL: teacher}, context_of(CELLS))[LEVEL]
    (first,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), student)


def test_compiled_without_a_break(monkeypatch):
    monkeypatch.setattr(ssim_gpu, "available", lambda maps, **options: True)
    loss, context = SSIMLoss(window_size=3), context_of(CELLS)
    student, teacher = related_maps()

    def step(student, teacher):
        return loss({LEVEL: student}, {LEVEL: teacher}, context)[LEVEL]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        x = student.clone().requires_grad_()
        value = function(x, teacher)
        results.append((value.detach(), torch.autograd.grad(value, x)[0]))
    torch.testing.assert_close(*results)


def test_a_kernel_that_is_wrong_is_found_and_not_used(monkeypatch, caplog):
    student, teacher = related_maps()
    loss, context = SSIMLoss(window_size=3, k1=0.02), context_of(CELLS)
    right = ssim_gpu.ssim_loss_triton
    monkeypatch.setattr(ssim_gpu, "ssim_loss_triton", lambda *a, **o: 1.001 * right(*a, **o))
    ssim_gpu._trial.cache_clear()
    value, gradient = evaluate(loss, student, teacher, context)
    assert "failed their trial on cpu (a gradient deviates by 1" in caplog.text
    known = SSIMLoss(window_size=3, k1=0.02, backend="definition")
    assert all(map(torch.equal, (value, gradient), evaluate(known, student, teacher, context)))
    evaluate(loss, student, teacher, context)
    assert len(caplog.records) == 1  # said once
    ssim_gpu._trial.cache_clear()
