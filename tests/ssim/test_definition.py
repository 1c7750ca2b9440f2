import math
from itertools import product

import numpy as np
import pytest
import torch
from ssimkd.ssim import ssim_loss
from ssimkd.ssim.definition import ssim_map
from ssimkd.ssim.window import BORDERS
from torch.autograd import gradcheck

EXPONENTS = [(1, 1, 1), (0, 1, 1), (0, 0, 1), (1, 0.5, 2)]
SIZES = [(1, 1), (1, 9), (3, 4), (12, 13)]
DEFAULTS = {"window_size": 11, "sigma": 1.5, "k1": 0.01, "k2": 0.03, "data_range": 1.0}


def random_maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def related_maps(*shape, dtype=torch.float64):
    """Two maps that agree in part, so that no term of SSIM is near 0 or 1 everywhere."""
    x, noise = random_maps(*shape), random_maps(*shape, seed=1)
    return (0.3 * x + 0.5).to(dtype), (0.2 * x + 0.2 * noise + 0.6).to(dtype)


# --- reference: Wang et al. 2004, one window after the other ---


def reference_radius(cells, window_size, border):
    """ssim_map's rule: reflection needs `radius` other cells, "valid" the whole window."""
    if border == "reflect":
        window_size = min(window_size, 2 * cells - 1)
    if border == "valid":
        window_size = min(window_size, cells if cells % 2 else cells - 1)
    return window_size // 2


def value_at(x, i, j, border):
    """A cell of a map, or what the border puts outside it; None where there is nothing."""
    height, width = x.shape
    if border == "reflect":
        i = -i if i < 0 else 2 * (height - 1) - i if i >= height else i
        j = -j if j < 0 else 2 * (width - 1) - j if j >= width else j
    if 0 <= i < height and 0 <= j < width:
        return x[i, j]
    return 0.0 if border == "zero" else None


def window_statistics(x, y, centre, radii, sigma, border):
    weights, xs, ys = [], [], []
    for di in range(-radii[0], radii[0] + 1):
        for dj in range(-radii[1], radii[1] + 1):
            a = value_at(x, centre[0] + di, centre[1] + dj, border)
            if a is not None:
                weights.append(math.exp(-(di**2 + dj**2) / (2 * sigma**2)))
                xs.append(a)
                ys.append(value_at(y, centre[0] + di, centre[1] + dj, border))
    w, xs, ys = np.array(weights) / sum(weights), np.array(xs), np.array(ys)
    mu_x, mu_y = (w * xs).sum(), (w * ys).sum()
    var_x, var_y = (w * (xs - mu_x) ** 2).sum(), (w * (ys - mu_y) ** 2).sum()
    return mu_x, mu_y, var_x**0.5, var_y**0.5, (w * (xs - mu_x) * (ys - mu_y)).sum()


def reference_terms(x, y, border, window_size, sigma, k1, k2, data_range):
    """l, c, s of two (H, W) maps."""
    radii = [reference_radius(n, window_size, border) for n in x.shape]
    margins = radii if border == "valid" else (0, 0)
    rows, columns = (range(m, n - m) for m, n in zip(margins, x.shape))
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    terms = np.empty((3, len(rows), len(columns)))
    for i, j in product(rows, columns):
        mx, my, sx, sy, cov = window_statistics(x, y, (i, j), radii, sigma, border)
        terms[:, i - margins[0], j - margins[1]] = (
            (2 * mx * my + c1) / (mx**2 + my**2 + c1),
            (2 * sx * sy + c2) / (sx**2 + sy**2 + c2),
            (cov + c2 / 2) / (sx * sy + c2 / 2),
        )
    return terms


def reference_all(student, teacher, border, **options):
    """l, c, s of (N, C, H, W) maps, as a (3, N, C, H', W') tensor."""
    options = {**DEFAULTS, **options}
    terms = [
        [reference_terms(x, y, border, **options) for x, y in zip(xs, ys)]
        for xs, ys in zip(student.double().numpy(), teacher.double().numpy())
    ]
    return torch.from_numpy(np.array(terms)).permute(2, 0, 1, 3, 4)


def combine(terms, exponents):
    powers = [
        t.sign() * t.abs() ** e if e else torch.ones_like(t) for t, e in zip(terms, exponents)
    ]
    return powers[0] * powers[1] * powers[2]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("border", BORDERS)
def test_equals_wang_et_al(border, size):
    student, teacher = related_maps(2, 2, *size)
    terms = reference_all(student, teacher, border)
    for exponents in EXPONENTS:
        expected = combine(terms, exponents)
        result = ssim_map(student, teacher, border=border, exponents=exponents)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
        single = ssim_map(student.float(), teacher.float(), border=border, exponents=exponents)
        torch.testing.assert_close(single, expected.float(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 1},
        {"window_size": 5},
        {"window_size": 7, "sigma": 0.5},
        {"window_size": 3, "sigma": 10.0},
        {"k1": 0.2},
        {"k2": 0.5},
        {"data_range": 6.0},
        {"window_size": 5, "sigma": 2.0, "k1": 0.05, "k2": 0.1, "data_range": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("border", BORDERS)
def test_options_equal_wang_et_al(border, options):
    student, teacher = related_maps(1, 1, 6, 7)
    terms = reference_all(student, teacher, border, **options)
    for exponents in EXPONENTS:
        result = ssim_map(student, teacher, border=border, exponents=exponents, **options)
        torch.testing.assert_close(result, combine(terms, exponents), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("border", "window_size", "result_size"),
    # 5 x 5 cells: 4 cells to mirror beside the edge cell allow 2 * 4 + 1 = 9; "valid" allows 5
    [("reflect", 9, (5, 5)), ("valid", 5, (1, 1))],
)
def test_small_map_takes_the_largest_window_that_fits(border, window_size, result_size):
    student, teacher = related_maps(1, 2, 5, 5)
    result = ssim_map(student, teacher, border=border, window_size=11)
    same = ssim_map(student, teacher, border=border, window_size=window_size)
    assert result.shape[-2:] == result_size
    assert torch.equal(result, same)


@pytest.mark.parametrize("window_size", [1, 3, 7])
def test_valid_loses_the_window_less_one_cell(window_size):
    student, teacher = related_maps(2, 3, 7, 10)
    result = ssim_map(student, teacher, border="valid", window_size=window_size)
    assert result.shape == (2, 3, 7 - window_size + 1, 10 - window_size + 1)


def test_loss_is_half_of_one_less_the_mean_similarity():
    student, teacher = related_maps(2, 3, 6, 7)
    expected = (1 - combine(reference_all(student, teacher, "zero"), (1, 1, 1)).mean()) / 2
    torch.testing.assert_close(ssim_loss(student, teacher, border="zero"), expected)


# --- identities ---


@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
@pytest.mark.parametrize("border", BORDERS)
def test_equal_maps(border, exponents):
    teacher = random_maps(2, 3, 8, 9, dtype=torch.float32)
    student = teacher.clone().requires_grad_()
    similarity = ssim_map(student, teacher, border=border, exponents=exponents)
    torch.testing.assert_close(similarity, torch.ones_like(similarity), rtol=0, atol=1e-6)
    loss = ssim_loss(student, teacher, border=border, exponents=exponents)
    assert abs(loss.item()) < 1e-6
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_contrast_and_structure_ignore_an_offset_of_either_map():
    student, teacher = related_maps(1, 2, 8, 9)
    torch.testing.assert_close(
        ssim_map(student + 3, teacher - 5, exponents=(0, 1, 1)),
        ssim_map(student, teacher, exponents=(0, 1, 1)),
    )


def test_scaling_maps_and_data_range_alike_changes_nothing():
    student, teacher = related_maps(1, 2, 8, 9)
    torch.testing.assert_close(
        ssim_map(7 * student, 7 * teacher, data_range=7.0), ssim_map(student, teacher)
    )


@pytest.mark.parametrize("exponents", [(0, 1, 1), (1, 1, 1), (1, 2, 2), (0, 0.5, 0.5)], ids=str)
@pytest.mark.parametrize("border", BORDERS)
def test_contrast_times_structure_equals_the_separate_terms(border, exponents):
    alpha, beta, gamma = exponents
    teacher = random_maps(2, 2, 6, 7)
    mixed = random_maps(2, 2, 6, 7, seed=1) - 0.3 * teacher  # structure of either sign

    def value_and_gradient(*factors):
        student = mixed.clone().requires_grad_()
        value = 1.0
        for factor in factors:
            value = value * ssim_map(student, teacher, border=border, exponents=factor)
        return value, torch.autograd.grad(value.sum(), student)[0]

    joint = value_and_gradient(exponents)
    separate = value_and_gradient((alpha, 0, 0), (0, beta, 0), (0, 0, gamma))
    torch.testing.assert_close(joint, separate)


def test_anti_correlated_maps_have_negative_structure():
    teacher = random_maps(1, 2, 12, 12)
    structure = ssim_map(-teacher, teacher, exponents=(0, 0, 1))
    # s = (C3 - var) / (var + C3), near -1 where var >> C3 = 0.03^2 / 2
    assert structure.max() < -0.9
    squared = ssim_map(-teacher, teacher, exponents=(0, 0, 2))
    torch.testing.assert_close(squared, -(structure**2))


def test_channels_and_images_are_independent():
    student, teacher = related_maps(3, 4, 6, 7)
    batched = ssim_map(student, teacher)
    for n, c in product(range(3), range(4)):
        one = (slice(n, n + 1), slice(c, c + 1))
        torch.testing.assert_close(batched[one], ssim_map(student[one], teacher[one]))


# --- gradients ---


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 5)], ids=str)
@pytest.mark.parametrize("exponents", [*EXPONENTS, (0.5, 2, 1.5)], ids=str)
@pytest.mark.parametrize("border", BORDERS)
def test_gradient_equals_finite_differences(border, exponents, size):
    student, teacher = related_maps(1, 2, *size)

    def similarity(x):
        return ssim_map(x, teacher, window_size=3, border=border, exponents=exponents)

    assert gradcheck(similarity, (student.requires_grad_(),))


def test_teacher_gets_no_gradient():
    student, teacher = (m.requires_grad_() for m in related_maps(1, 1, 6, 7))
    ssim_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert not ssim_loss(student.detach(), teacher).requires_grad


def hostile_pairs():
    shape = (1, 2, 9, 10)
    x, y = (
        random_maps(*shape, dtype=torch.float32),
        random_maps(*shape, seed=1, dtype=torch.float32),
    )
    magnitude = 10.0 ** (3 * random_maps(*shape, seed=2, dtype=torch.float32))
    step = torch.zeros(shape)
    step[..., 5:] = 1.0
    return {
        "offset": (1e4 + 0.01 * x, 1e4 + 0.01 * y),
        "offset-of-one": (1e4 + 0.01 * x, 0.01 * y),
        "opposite-offsets": (1e4 + 0.01 * x, -1e4 + 0.01 * x),
        "extremes": (x * magnitude, y * magnitude.flip(3)),
        "huge": (1e8 * x, 1e8 * y),
        "tiny": (1e-12 * x, 1e-12 * y),
        "huge-and-tiny": (1e8 * x, 1e-8 * x),
        "zeros": (torch.zeros(shape), torch.zeros(shape)),
        "constants": (torch.full(shape, 5.0), torch.full(shape, -3.0)),
        "large-constants": (torch.full(shape, 1e4), torch.full(shape, 1e4)),
        "flat-student": (torch.full(shape, 0.7), y),
        "flat-teacher": (x, torch.full(shape, 0.7)),
        "part-flat": (step, -step),
        "negated": (-1e3 * x, 1e3 * x),
    }


@pytest.mark.parametrize("exponents", EXPONENTS[-2:], ids=str)
@pytest.mark.parametrize("border", ["renormalize", "valid"])
@pytest.mark.parametrize("name", hostile_pairs())
def test_hostile_maps_stay_in_range_with_finite_gradients(name, border, exponents):
    student, teacher = hostile_pairs()[name]
    student.requires_grad_()
    similarity = ssim_map(student, teacher, border=border, exponents=exponents)
    assert similarity.dtype == torch.float32
    assert similarity.abs().max() <= 1 + 1e-5
    (gradient,) = torch.autograd.grad(similarity.sum(), student)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("border", ["renormalize", "reflect", "valid"])
def test_constant_maps_reduce_to_luminance(border):
    student, teacher = torch.full((1, 1, 8, 8), 3.0), torch.full((1, 1, 8, 8), 4.0)
    similarity = ssim_map(student, teacher, border=border)
    # l = (2 * 3 * 4 + C1) / (9 + 16 + C1) with C1 = 0.01^2; c = s = 1
    expected = (24 + 1e-4) / (25 + 1e-4)
    torch.testing.assert_close(similarity, torch.full_like(similarity, expected))


def test_a_common_offset_costs_no_precision():
    x, y = hostile_pairs()["offset"]
    single = ssim_map(x, y, exponents=(0, 1, 1))
    double = ssim_map(x.double(), y.double(), exponents=(0, 1, 1))
    # without the shift, E[x^2] = 1e8 would be rounded to multiples of 8, and C2 is 0.03^2
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-3)


# --- precision ---


@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
def test_autocast_changes_nothing(exponents):
    teacher = random_maps(2, 3, 8, 9, dtype=torch.float32)
    student = random_maps(2, 3, 8, 9, seed=1, dtype=torch.float32).requires_grad_()
    loss = ssim_loss(student, teacher, exponents=exponents)
    (gradient,) = torch.autograd.grad(loss, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_loss = ssim_loss(student, teacher, exponents=exponents)
    (cast_gradient,) = torch.autograd.grad(cast_loss, student)
    assert cast_loss.dtype == torch.float32
    assert torch.equal(cast_loss, loss)
    assert torch.equal(cast_gradient, gradient)


# --- errors ---


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape"),
    [
        ((1, 2, 4, 5), (1, 2, 5, 4)),
        ((1, 2, 4, 5), (1, 1, 4, 5)),
        ((2, 4, 5), (2, 4, 5)),
        ((0, 2, 4, 5), (0, 2, 4, 5)),
        ((1, 2, 0, 5), (1, 2, 0, 5)),
    ],
)
def test_wrong_shapes_raise(student_shape, teacher_shape):
    with pytest.raises(ValueError, match="shapes") as error:
        ssim_map(torch.zeros(student_shape), torch.zeros(teacher_shape))
    assert str(student_shape) in str(error.value) and str(teacher_shape) in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("window_size", 4),
        ("window_size", 0),
        ("window_size", -3),
        ("window_size", 5.0),
        ("sigma", 0.0),
        ("sigma", -1.5),
        ("sigma", math.nan),
        ("k1", 0.0),
        ("k2", -0.03),
        ("data_range", 0.0),
        ("exponents", (1, 1)),
        ("exponents", (1, -1, 1)),
        ("exponents", (1, 1, math.nan)),
        ("border", "replicate"),
        ("border", ""),
    ],
)
def test_options_out_of_range_raise(option, value):
    maps = torch.zeros(1, 1, 4, 5)
    for function in (ssim_map, ssim_loss):
        with pytest.raises(ValueError, match=option):
            function(maps, maps, **{option: value})


@pytest.mark.parametrize("offset", [10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("exponents", [(0, 1, 1), (0, 0, 1)], ids=str)
def test_an_offset_of_one_map_costs_no_precision(exponents, offset):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 1, 4, 20, 20, generator=generator)
    student, teacher = x + offset, x + 0.3 * noise
    single = ssim_map(student, teacher, exponents=exponents)
    double = ssim_map(student.double(), teacher.double(), exponents=exponents)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)
