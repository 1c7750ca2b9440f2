"""The compiled form of the SSIM loss: its compiler, or none, and its threads."""

import logging

import pytest
import torch
from ssimkd.losses import Context, SSIMLoss
from ssimkd.ssim import analytic as ssim_fast
from ssimkd.ssim import compiled as ssim_compiled

needs_compiler = pytest.mark.skipif(ssim_compiled.library() is None, reason="no C++ compiler")


def value_and_gradient(compile=False, **options):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 30, 40, generator=generator)
    student.requires_grad_()
    context = Context([(30, 40), (21, 32)], {"p0": 1})
    value = SSIMLoss(backend="auto" if compile else "analytic", **options)(
        {"p0": student}, {"p0": teacher}, context
    )["p0"]
    return value.detach(), torch.autograd.grad(value, student)[0]


def forbid(monkeypatch, module, name):
    def fail(*args, **kwargs):
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(module, name, fail)


@needs_compiler
def test_compile_leaves_no_arithmetic_to_the_other_form(monkeypatch):
    expected = value_and_gradient()
    forbid(monkeypatch, ssim_fast, "_compare")
    torch.testing.assert_close(value_and_gradient(compile=True), expected, rtol=1e-4, atol=1e-9)


def test_nothing_is_built_where_it_is_switched_off(monkeypatch):
    forbid(monkeypatch, ssim_compiled, "library")
    value_and_gradient()


@needs_compiler
@pytest.mark.parametrize("border", ["renormalize", "reflect", "valid"])
def test_window_wider_than_a_vector(border):
    options = dict(window_size=37, sigma=9.0, border=border)
    compiled, eager = value_and_gradient(compile=True, **options), value_and_gradient(**options)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-9)


@needs_compiler
def test_threads_share_the_maps_and_change_nothing():
    expected, threads = value_and_gradient(compile=True), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared = value_and_gradient(compile=True)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, shared, expected))


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("no-such-compiler", "FileNotFoundError"),
        ("false", "exit status 1"),
        ("true", "OSError"),
        ("c++ '", "No closing quotation"),
        (r"""sh -c 'printf "\351chec" >&2; exit 1'""", "\ufffdchec"),  # Latin-1
        pytest.param("c++ -Dssim=other", "AttributeError", marks=needs_compiler),
    ],
)
def test_without_a_working_compiler_a_line_and_the_same_loss(monkeypatch, caplog, compiler, reason):
    expected = value_and_gradient()
    monkeypatch.setenv("CXX", compiler)
    ssim_compiled.library.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "ssimkd"):
            results = [value_and_gradient(compile=True) for _ in range(2)]
    finally:
        ssim_compiled.library.cache_clear()
    assert all(map(torch.equal, results[0] + results[1], expected + expected))
    (record,) = caplog.records
    assert compiler in record.getMessage() and reason in record.getMessage()
