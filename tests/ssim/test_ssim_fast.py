import gc
import sys
import threading
from functools import partial

import pytest
import torch
from ssimkd.losses import Context, SSIMLoss
from ssimkd.ssim import analytic as ssim_fast
from ssimkd.ssim import compiled as ssim_compiled
from ssimkd.ssim.definition import Window
from ssimkd.ssim.normalize import AFFINE, SCOPES

LEVEL, STRIDE = "p3", 8
SIZES = [(1, 1), (1, 7), (5, 4), (13, 21), (47, 70)]  # 47 x 70 is cut into blocks along both axes
BORDERS = ("renormalize", "reflect", "valid")
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture(autouse=True, params=[False, True], ids=["eager", "compiled"])
def both_forms(request, monkeypatch):
    """Every test of this file takes `SSIMLoss` without and with COMPILE."""
    if request.param and ssim_compiled.library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(
        sys.modules[__name__],
        "SSIMLoss",
        partial(SSIMLoss, backend="cpp" if request.param else "analytic"),
    )


def related_maps(*shape, seed=0, dtype=torch.float32):
    """Two stacks of maps that agree in part, each channel of another scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, *shape, generator=generator)
    scale = torch.arange(1.0, shape[1] + 1).view(-1, 1, 1)
    return (scale * x + scale).to(dtype), (x + noise - scale).to(dtype)


def context_of(*cells, mask_padding=True):
    """Images that cover `cells` (height, width)."""
    return Context(
        [(h * STRIDE, w * STRIDE) for h, w in cells], {LEVEL: STRIDE}, None, mask_padding
    )


def evaluate(loss, student, teacher, context):
    """Value and gradient of a loss."""
    student = student.detach().requires_grad_()
    value = loss({LEVEL: student}, {LEVEL: teacher}, context)[LEVEL]
    return value.detach(), torch.autograd.grad(value, student)[0]


def by_autograd(loss, student, teacher, context):
    """Value and gradient of the reference."""
    student = student.detach().requires_grad_()
    known = type(loss)(loss.weight, loss.normalize, loss.normalize_scope)
    known.options, known.backend = loss.options, "definition"
    value = known.compare_level(LEVEL, student, teacher, context)
    return value.detach(), torch.autograd.grad(value, student)[0]


def assert_equals_reference(loss, student, teacher, context, rtol=1e-6):
    """The fast form in float32 against autograd in float64, relative to the largest gradient.

    Where the loss itself rounds badly (means of few cells) autograd in float32 sets the limit.
    """
    assert ssim_fast.covers(student, teacher, loss.normalize, **loss.options)
    value, gradient = evaluate(loss, student, teacher, context)
    _, single = by_autograd(loss, student, teacher, context)
    exact_value, exact = by_autograd(loss, student.double(), teacher.double(), context)
    assert value.dtype == torch.float32 and gradient.dtype == student.dtype
    assert abs(value - exact_value) < 1e-6
    limit = max(rtol * exact.abs().max(), 4 * (single - exact).abs().max())
    assert (gradient - exact).abs().max() <= limit + 1e-12


# --- equal to the reference ---


@every_size
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("window_size", [3, 11])
def test_equals_autograd_for_every_window(border, window_size, size):
    loss = SSIMLoss(border=border, window_size=window_size)
    assert_equals_reference(loss, *related_maps(2, 3, *size), context_of(size, size), rtol=2e-6)


@every_size
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("short", [0, 1000], ids=["in blocks", "whole rows"])
def test_products_average_as_the_reference_and_back(short, border, size, monkeypatch):
    monkeypatch.setattr(ssim_fast, "SHORT", short)
    axes = ssim_fast._matrices(*size, 11, 1.5, border)
    (h, w), (h_out, w_out) = size, (len(m) for m in axes)
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(h, 4, 5, w, generator=generator)
    slopes = torch.randn(h_out, 4, 5, w_out, generator=generator)
    buffers = torch.empty(2, stack.numel())
    average = ssim_fast._Blur(axes)(stack, *buffers).double()
    back = ssim_fast._Blur([m.t() for m in axes])(slopes, *torch.empty(2, stack.numel())).double()
    maps = stack.double().permute(1, 2, 0, 3)
    window = Window(size, 11, 1.5, border, maps)
    expected = window.average(window.pad(maps)).permute(2, 0, 1, 3)
    torch.testing.assert_close(average, expected, rtol=0, atol=2e-6)
    # <B x, z> = <x, B^T z>
    torch.testing.assert_close((average * slopes).sum(), (stack * back).sum(), rtol=0, atol=1e-3)


def test_maps_that_nearly_agree_keep_their_digits():
    # differences of means and of variances, not of products: autograd is off by 5 % here
    student, noise = torch.rand(2, 1, 8, 25, 42, generator=torch.Generator().manual_seed(0))
    loss, context = SSIMLoss(normalize="none"), context_of((25, 42))
    teacher = student + 1e-3 * noise
    _, gradient = evaluate(loss, student, teacher, context)
    _, exact = by_autograd(loss, student.double(), teacher.double(), context)
    assert (gradient - exact).abs().max() < 1e-3 * exact.abs().max()


def test_window_of_one_cell_compares_cells():
    # no variance: SSIM is l, whose rounding near mu = 0 is that of the shift
    loss = SSIMLoss(window_size=1)
    maps = related_maps(2, 3, 9, 10)
    assert_equals_reference(loss, *maps, context_of((9, 10), (9, 10)), rtol=3e-5)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", AFFINE)
@pytest.mark.parametrize("border", BORDERS)
def test_equals_autograd_for_every_normalisation_of_masked_images(border, normalize, scope):
    loss = SSIMLoss(normalize=normalize, normalize_scope=scope, border=border)
    context = context_of((14, 22), (9, 5), (14, 22), (3, 4))
    assert_equals_reference(loss, *related_maps(4, 3, 14, 22), context, rtol=5e-6)


@pytest.mark.parametrize(
    "options",
    [{"sigma": 0.7}, {"k1": 0.2}, {"k2": 0.3}, {"window_size": 7, "sigma": 4.0, "k1": 0.1}],
    ids=str,
)
def test_options_reach_the_fast_form(options):
    maps, context = related_maps(1, 2, 13, 21), context_of((13, 21))
    assert_equals_reference(SSIMLoss(**options), *maps, context)
    changed, plain = (evaluate(SSIMLoss(**o), *maps, context)[0] for o in (options, {}))
    assert abs(changed - plain) > 1e-6


def test_a_map_of_fpn_size_deviates_by_a_millionth():
    generator = torch.Generator().manual_seed(0)
    student, noise = torch.randn(2, 1, 32, 50, 84, generator=generator)
    assert_equals_reference(SSIMLoss(), student, student + noise, context_of((50, 84)))


def test_many_channels_are_taken_in_parts(monkeypatch):
    maps, context = related_maps(2, 7, 9, 10), context_of((9, 10), (9, 10))
    whole = evaluate(SSIMLoss(), *maps, context)
    monkeypatch.setattr(ssim_fast, "CHUNK", 3 * 90 // torch.get_num_threads())
    torch.testing.assert_close(evaluate(SSIMLoss(), *maps, context), whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scope", SCOPES)
def test_equal_extremes_share_their_gradient(scope):
    student, teacher = related_maps(2, 3, 12, 13)
    student = student.clamp(-0.5, 1.5).round(decimals=1)  # many minima, many maxima
    loss, context = SSIMLoss(normalize_scope=scope), context_of((12, 13), (7, 13))
    assert_equals_reference(loss, student, teacher, context, rtol=2e-6)


@pytest.mark.parametrize("normalize", AFFINE)
def test_flat_maps(normalize):
    student, teacher = related_maps(2, 3, 9, 10)
    loss, context = SSIMLoss(normalize=normalize), context_of((9, 10), (9, 10))
    flat_student, flat_teacher = student.clone(), teacher.clone()
    flat_student[0, 1] = 0.7
    flat_teacher[1, 2] = -3.0
    assert_equals_reference(loss, flat_student, teacher, context, rtol=5e-6)
    assert_equals_reference(loss, student, flat_teacher, context, rtol=5e-6)


def test_equal_maps_cost_nothing():
    _, teacher = related_maps(2, 3, 9, 10)
    value, gradient = evaluate(SSIMLoss(), teacher, teacher, context_of((9, 10), (9, 10)))
    assert abs(value) < 1e-6
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_hostile_raw_maps_stay_in_range(size):
    student, teacher = related_maps(2, 3, 9, 10)
    context = context_of((9, 10), (9, 10))
    for maps in ((size * student, teacher), (size * student, -size * student)):
        value, gradient = evaluate(SSIMLoss(normalize="none"), *maps, context)
        assert -1e-6 <= value <= 1 + 1e-6
        assert torch.isfinite(gradient).all()


# --- inputs ---


def layouts():
    def cropped(m):
        return torch.nn.functional.pad(m, (1, 2, 3, 4))[..., 3:-4, 1:-2]

    return {
        "channels_last": lambda m: m.to(memory_format=torch.channels_last),
        "cropped": cropped,
        "turned": lambda m: m.transpose(2, 3).contiguous().transpose(2, 3),
        "of_a_batch": lambda m: torch.stack([m, m], 1)[:, 0],
    }


@pytest.mark.parametrize("layout", layouts().values(), ids=layouts())
def test_layout_in_memory_does_not_matter(layout):
    maps, context = related_maps(2, 3, 14, 22), context_of((14, 22), (9, 5))
    expected = evaluate(SSIMLoss(), *maps, context)
    torch.testing.assert_close(evaluate(SSIMLoss(), *map(layout, maps), context), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_compared_in_float32(dtype):
    maps, context = related_maps(2, 3, 14, 22, dtype=dtype), context_of((14, 22), (9, 5))
    value, gradient = evaluate(SSIMLoss(), *maps, context)
    expected, expected_gradient = evaluate(SSIMLoss(), *(m.float() for m in maps), context)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=1e-2, atol=1e-6)


def test_autocast_changes_nothing():
    maps, context = related_maps(2, 3, 14, 22), context_of((14, 22), (9, 5))
    expected = evaluate(SSIMLoss(), *maps, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = evaluate(SSIMLoss(), *maps, context)
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize(
    "use, default, restored",
    [
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.set_default_dtype, torch.bfloat16, torch.float32),
        (torch.set_default_device, "meta", None),  # one that is not the maps'
    ],
)
@pytest.mark.parametrize("normalize", ["minmax", "none"])
def test_defaults_of_torch_change_nothing(normalize, use, default, restored, monkeypatch):
    maps, context = related_maps(2, 3, 14, 22), context_of((14, 22), (9, 5))
    loss = SSIMLoss(normalize=normalize)
    expected = evaluate(loss, *maps, context)
    monkeypatch.setattr(ssim_fast, "_scratch", threading.local())
    kept = (ssim_fast._matrices, ssim_fast._axes, ssim_fast._blurs)
    for function in kept:
        function.cache_clear()
    use(default)
    try:
        found = evaluate(loss, *maps, context)
    finally:
        use(restored)
        for function in kept:
            function.cache_clear()
    assert found[0].dtype == found[1].dtype == torch.float32
    assert all(map(torch.equal, found, expected))


def test_two_runs_are_equal_to_the_last_bit():
    maps, context = related_maps(2, 5, 47, 70), context_of((47, 70), (40, 51))
    first, second = (evaluate(SSIMLoss(), *maps, context) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_padding_gets_no_gradient():
    student, teacher = related_maps(2, 3, 14, 22)
    _, gradient = evaluate(SSIMLoss(), student, teacher, context_of((14, 22), (9, 5)))
    assert gradient[1, :, 9:].abs().max() == 0 and gradient[1, :, :, 5:].abs().max() == 0
    assert gradient[1, :, :9, :5].abs().min() > 0


@pytest.mark.parametrize("scope", SCOPES)
def test_small_maps_of_a_batch_equal_the_images_alone(scope):
    student, teacher = related_maps(3, 4, 13, 21)
    loss, context = SSIMLoss(normalize_scope=scope), context_of(*[(13, 21)] * 3)
    assert_equals_reference(loss, student, teacher, context)


def test_memory_that_is_kept_serves_training_after_inference(monkeypatch):
    maps, context = related_maps(2, 3, 9, 10), context_of((9, 10), (9, 10))
    expected = evaluate(SSIMLoss(), *maps, context)
    monkeypatch.setattr(ssim_fast, "_scratch", threading.local())
    with torch.inference_mode():
        SSIMLoss()({LEVEL: maps[0]}, {LEVEL: maps[1]}, context)
    assert all(map(torch.equal, evaluate(SSIMLoss(), *maps, context), expected))


def test_memory_that_is_kept_grows_with_the_maps(monkeypatch):
    monkeypatch.setattr(ssim_fast, "CHUNK", 1)
    monkeypatch.setattr(ssim_fast, "_scratch", threading.local())
    for size in ((5, 4), (47, 70), (13, 21)):
        assert_equals_reference(SSIMLoss(), *related_maps(1, 3, *size), context_of(size), 2e-6)


# --- what autograd asks for ---


def test_without_gradient_only_the_value_is_made():
    student, teacher = related_maps(2, 3, 9, 10)
    context = context_of((9, 10), (9, 10))
    expected, _ = evaluate(SSIMLoss(), student, teacher, context)
    value = SSIMLoss()({LEVEL: student}, {LEVEL: teacher}, context)[LEVEL]
    assert not value.requires_grad
    assert torch.equal(value, expected)


def test_gradient_is_scaled_by_what_comes_from_above():
    student, teacher = related_maps(1, 2, 9, 10)
    context = context_of((9, 10))
    _, gradient = evaluate(SSIMLoss(), student, teacher, context)
    student.requires_grad_()
    value = SSIMLoss()({LEVEL: student}, {LEVEL: teacher}, context)[LEVEL]
    (scaled,) = torch.autograd.grad(-3 * value, student)
    torch.testing.assert_close(scaled, -3 * gradient)


def test_a_retained_graph_gives_the_gradient_again():
    student, teacher = related_maps(1, 2, 9, 10)
    student.requires_grad_()
    value = SSIMLoss()({LEVEL: student}, {LEVEL: teacher}, context_of((9, 10)))[LEVEL]
    (first,) = torch.autograd.grad(value, student, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * value, student)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first, rtol=1e-4, atol=1e-8)


def test_second_derivatives_are_the_references():
    student, teacher = related_maps(1, 2, 6, 7)
    loss, context = SSIMLoss(window_size=3, normalize="none"), context_of((6, 7))

    def second(student, teacher):
        student = student.detach().requires_grad_()
        value = loss({LEVEL: student}, {LEVEL: teacher}, context)[LEVEL]
        (first,) = torch.autograd.grad(value, student, create_graph=True)
        return torch.autograd.grad(first.square().sum(), student)[0]

    expected = second(student.double(), teacher.double())
    assert expected.abs().max() > 0
    deviation = (second(student, teacher) - expected).abs().max()
    assert deviation < 1e-3 * expected.abs().max()


def test_second_derivative_without_the_teachers_maps_says_so():
    student, teacher = related_maps(1, 2, 6, 7)
    student.requires_grad_()
    value = SSIMLoss()({LEVEL: student}, {LEVEL: teacher}, context_of((6, 7)))[LEVEL]
    del teacher
    gc.collect()
    with pytest.raises(RuntimeError, match="needs the teacher's maps"):
        torch.autograd.grad(value, student, create_graph=True)


def test_the_teachers_maps_are_not_kept():
    student, teacher = related_maps(1, 2, 6, 7)
    student.requires_grad_()
    value = SSIMLoss()({LEVEL: student}, {LEVEL: teacher}, context_of((6, 7)))[LEVEL]
    data = teacher.untyped_storage()._weak_ref()
    del teacher
    gc.collect()
    assert torch.UntypedStorage._expired(data)
    assert value.requires_grad


@pytest.mark.parametrize(
    "options",
    [{"border": "zero"}, {"exponents": (0, 1, 1)}, {"normalize": "standardize"}],
    ids=str,
)
def test_what_is_not_covered_goes_to_autograd(options):
    loss, context = SSIMLoss(**options), context_of((14, 22), (9, 5))
    student, teacher = related_maps(2, 3, 14, 22)
    assert not ssim_fast.covers(student, teacher, loss.normalize, **loss.options)
    value, gradient = evaluate(loss, student, teacher, context)
    exact, exact_gradient = evaluate(loss, student.double(), teacher.double(), context)
    torch.testing.assert_close(value.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-6)


def test_maps_that_differ_in_shape_raise():
    student, teacher = related_maps(1, 2, 6, 7)[0], related_maps(1, 2, 7, 6)[1]
    with pytest.raises(ValueError, match="shapes"):
        SSIMLoss(normalize="none")({LEVEL: student}, {LEVEL: teacher}, context_of((6, 7)))
