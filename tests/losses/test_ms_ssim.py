import math

import numpy as np
import pytest
import torch
from loss_cases import batch
from ssimkd.losses import Context, MSSSIMLoss, SSIMLoss
from test_definition import DEFAULTS, reference_terms, related_maps

WANG = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def on_one_level(student, teacher, **options):
    """The loss of maps without padding, raw unless `options` say otherwise."""
    height, width = student.shape[-2:]
    context = Context([(height, width)] * len(student), {"p3": 1})
    loss = MSSSIMLoss(**{"normalize": "none", **options})
    return loss({"p3": student}, {"p3": teacher}, context)["p3"]


# --- reference: Wang, Simoncelli, Bovik 2003, on one channel of one image ---


def halve(x):
    """Means of 2 x 2 cells; at an odd edge, of the cells that exist."""
    height, width = (math.ceil(n / 2) for n in x.shape)
    blocks = [
        [x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for j in range(width)]
        for i in range(height)
    ]
    return np.array(blocks)


def scale_means(x, y, scales, **options):
    """Mean of c s at each scale, of l c s at the last."""
    means = []
    for scale in range(scales):
        terms = reference_terms(x, y, "renormalize", **{**DEFAULTS, **options})
        means.append((terms if scale == scales - 1 else terms[1:]).prod(axis=0).mean())
        x, y = halve(x), halve(y)
    return means


@pytest.mark.parametrize("size", [(48, 33), (37, 50)], ids=str)  # 37 -> 19 -> 10 -> 5 -> 3
def test_equals_wang_et_al_at_five_scales(size):
    student, teacher = related_maps(1, 2, *size)
    values = []
    for x, y in zip(student[0].numpy(), teacher[0].numpy()):
        means = scale_means(x, y, 5, window_size=3)
        assert min(means) > 0.1
        values.append(math.prod(m ** (e / sum(WANG)) for m, e in zip(means, WANG)))
    value = on_one_level(student, teacher, window_size=3)
    assert value.item() == pytest.approx((1 - np.mean(values)) / 2, rel=1e-10)


@pytest.mark.parametrize(
    ("side", "scales"),
    [(1, 1), (11, 1), (20, 1), (21, 2), (40, 2), (41, 3), (80, 3), (81, 4), (161, 5), (999, 5)],
)
def test_as_many_scales_as_hold_the_window(side, scales):
    # The side is halved and rounded up: 21 -> 11, 41 -> 21 -> 11, ...
    exponents = MSSSIMLoss().exponents_for(side)
    assert exponents == pytest.approx([e / sum(WANG[:scales]) for e in WANG[:scales]])
    assert sum(exponents) == pytest.approx(1)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 30), (20, 60)], ids=str)
@pytest.mark.parametrize("normalize", ["minmax", "none"])
def test_a_map_of_less_than_two_windows_reduces_to_ssim(size, normalize):
    student, teacher = related_maps(2, 3, *size)
    student = 0.9 * teacher + 0.1 * student  # alike enough for every mean to exceed 0.1
    context = Context([size] * 2, {"p3": 1})
    known = SSIMLoss(normalize=normalize)({"p3": student}, {"p3": teacher}, context)["p3"]
    torch.testing.assert_close(on_one_level(student, teacher, normalize=normalize), known)


@pytest.mark.parametrize(
    "options",
    [{"border": "valid"}, {"window_size": 3, "sigma": 0.7}, {"k1": 0.5, "k2": 0.5}],
    ids=str,
)
def test_one_exponent_reduces_to_ssim_with_the_same_options(options):
    student, teacher, context = batch([(64, 96)] * 2, [0, 0], channels=3)
    student = {level: 0.9 * x + 0.1 * student[level] for level, x in teacher.items()}
    found = MSSSIMLoss(scale_exponents=[0.5], **options)(student, teacher, context)
    torch.testing.assert_close(found, SSIMLoss(**options)(student, teacher, context))
    plain = MSSSIMLoss(scale_exponents=[0.5])(student, teacher, context)
    assert abs(found["p3"] - plain["p3"]) > 1e-6


# --- similarity below 0.1 ---


def test_opposite_structure_keeps_a_gradient_towards_the_teacher():
    teacher = related_maps(1, 1, 24, 24)[0]  # two scales
    student = (1 - teacher).requires_grad_()
    value = on_one_level(student, teacher, k2=1.0)
    (gradient,) = torch.autograd.grad(value, student)
    assert 0 < value < 0.5
    assert torch.isfinite(gradient).all()
    assert (gradient * (teacher - student)).sum() < -1e-3  # a step towards the teacher pays


def test_the_tangent_below_the_floor():
    # One window sees the whole 1 x 2 map: mean, variance and covariance of two cells by hand
    d, c2 = 0.2, 0.03**2
    student = torch.tensor([0.5 + d, 0.5 - d]).double().view(1, 1, 1, 2)
    teacher = torch.tensor([0.5 - d, 0.5 + d]).double().view(1, 1, 1, 2)
    value = on_one_level(student, teacher, window_size=3, sigma=1e9)
    similarity = (-2 * d**2 + c2) / (2 * d**2 + c2)  # cov = -d^2, var = d^2; luminance is 1
    expected = math.exp(math.log(0.1) + similarity / 0.1 - 1)
    assert value.item() == pytest.approx((1 - expected) / 2, rel=1e-9)
