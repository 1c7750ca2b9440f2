"""The Triton backend of `ssim_loss` on the CPU, in Triton's interpreter.

It has to be chosen before any import: test_triton.py runs this file in a process of its own, as
`TRITON_INTERPRET=1 pytest tests/ssim/interpret_triton.py`.
"""

import logging

import pytest
import torch
from ssimkd.ssim import gpu, ssim_loss
from test_backends import assert_equals_definition, evaluate, related_maps

SIZES = [(7, 6), (4, 6)]  # the second image is padded
OPTIONS = dict(
    window_size=5, sigma=1.5, k1=0.01, k2=0.03, data_range=1.0, exponents=(1, 1, 1), border="zero"
)

borders = pytest.mark.parametrize("border", ["renormalize", "zero"])
check = assert_equals_definition


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Takes CPU maps for a GPU's."""
    monkeypatch.setattr(gpu, "covers", lambda student, teacher, options: True)


@borders
@pytest.mark.parametrize("window_size", [3, 7, 11])
def test_every_window(window_size, border):
    maps = related_maps(1, 1, 4, 6)
    check(*maps, "triton", 5e-6, window_size=window_size, border=border)


@pytest.mark.parametrize("normalize", ["minmax", "teacher_range", "none"])
@pytest.mark.parametrize("scope", ["channel", "batch"])
def test_every_normalisation_of_padded_images(normalize, scope):
    options = dict(normalize=normalize, normalize_scope=scope, sizes=SIZES, window_size=3)
    check(*related_maps(2, 2, 7, 6), "triton", 1e-5, **options)


@borders
def test_without_luminance(border):
    options = dict(border=border, exponents=(0.0, 1.0, 1.0), window_size=5)
    check(*related_maps(1, 1, 5, 8), "triton", 5e-6, **options)


def test_a_window_of_one_cell_leaves_luminance():
    check(*related_maps(1, 2, 3, 4), "triton", 3e-5, window_size=1)


@borders
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1)], ids=str)
def test_maps_smaller_than_the_window(size, border):
    check(*related_maps(1, 1, *size), "triton", 5e-6, border=border, window_size=7)


@borders
def test_a_map_of_several_programs_and_maps_in_parts(border, monkeypatch):
    monkeypatch.setattr(gpu, "ROWS", 8)
    monkeypatch.setattr(gpu, "BLOCK", 32)
    monkeypatch.setattr(gpu, "CELLS", 1)
    maps, options = related_maps(1, 2, 17, 35), dict(border=border, window_size=5)
    check(*maps, "triton", 5e-6, **options)


def test_padding_gets_no_gradient_whatever_it_holds():
    student, teacher = related_maps(2, 2, 7, 6)
    options = dict(backend="triton", sizes=SIZES, window_size=3)
    expected = evaluate(student, teacher, **options)
    for m in (student, teacher):
        m[1, :, 4:] = float("nan")
    value, gradient = evaluate(student, teacher, **options)
    assert value == expected[0] and gradient.equal(expected[1])
    assert gradient[1, :, 4:].eq(0).all()


@pytest.mark.parametrize("exponents", [(1.0, 1.0, 1.0), (0.0, 1.0, 1.0)])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_reaches_value_and_gradient(which, exponents):
    maps = related_maps(1, 1, 5, 8)
    maps[which][0, 0, 2, 3] = float("nan")
    options = dict(normalize="none", exponents=exponents, window_size=3, backend="triton")
    value, gradient = evaluate(*maps, **options)
    assert value.isnan() and gradient.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_lose_nothing_but_the_rounding_of_the_gradient(dtype):
    maps = related_maps(1, 2, 5, 6, dtype=dtype)
    check(*maps, "triton", 2**-7 if dtype == torch.bfloat16 else 2**-10, window_size=3)


def test_maps_need_not_be_contiguous():
    student, teacher = related_maps(2, 2, 5, 6)
    options = dict(window_size=3, backend="triton")
    wide = torch.zeros(2, 2, 9, 9)
    wide[..., :5, :6] = student
    last = teacher.contiguous(memory_format=torch.channels_last)
    found = evaluate(wide[..., :5, :6], last, **options)
    assert all(map(torch.equal, found, evaluate(student, teacher, **options)))


def test_flat_and_equal_maps():
    student, teacher = related_maps(2, 2, 5, 6)
    student[0, 1], teacher[1, 0] = 0.7, -3.0
    check(student, teacher, "triton", 5e-6, window_size=3)
    value, gradient = evaluate(teacher, teacher, window_size=3, backend="triton")
    assert abs(value) < 1e-12 and gradient.abs().max() < 1e-7


def test_without_gradient_the_value_is_the_same():
    student, teacher = related_maps(1, 2, 5, 6)
    options = dict(normalize="minmax", window_size=3, backend="triton")
    value = ssim_loss(student, teacher, **options)
    assert not value.requires_grad and value == evaluate(student, teacher, **options)[0]


# --- the trial at first use ---


@pytest.fixture
def trial(monkeypatch):
    """Whether the kernels pass their trial for maps of float32."""
    monkeypatch.setattr(gpu, "TRIAL_SHAPE", (2, 6, 5))
    gpu.passes_self_test.cache_clear()
    kind = torch.device("cpu"), torch.float32, torch.float32, tuple(OPTIONS.items())
    yield lambda: gpu.passes_self_test(*kind)
    gpu.passes_self_test.cache_clear()


def test_right_kernels_pass(trial, caplog):
    with torch.inference_mode():
        assert trial()
    assert not caplog.records


def test_a_wrong_kernel_is_found_and_named_once(trial, caplog, monkeypatch):
    right = gpu.kernel

    def wrong(x, y, affine, options, gradient, factor):
        return right(x, y, affine, options, gradient, 1.001 * factor)

    monkeypatch.setattr(gpu, "kernel", wrong)
    assert not trial() and not trial()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "failed their trial on cpu (a gradient deviates by 1" in record.getMessage()
