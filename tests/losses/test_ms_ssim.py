import math

import numpy as np
import pytest
import torch
from loss_cases import batch
from ssimkd.losses import Context, MSSSIMLoss, SSIMLoss
from ssimkd.losses.ms_ssim import combine
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
    student = torch.cat([student, 0.8 - student]).requires_grad_()  # similar, and opposite
    teacher = torch.cat([teacher, teacher])
    context = Context([size] * 4, {"p3": 1})
    known = SSIMLoss(normalize=normalize)({"p3": student}, {"p3": teacher}, context)["p3"]
    found = on_one_level(student, teacher, normalize=normalize)
    torch.testing.assert_close(found, known)
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, known)]
    torch.testing.assert_close(*gradients)


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


@pytest.mark.parametrize("side", [9, 20], ids=["one scale", "three scales"])
def test_gradient_descent_from_opposite_maps_gets_as_far_as_with_ssim(side):
    teacher = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    context = Context([(side, side)], {"p3": 1})
    options, ends = {"normalize": "none", "window_size": 5}, {}
    for loss in (SSIMLoss(**options), MSSSIMLoss(**options)):
        student = -teacher
        for _ in range(200):
            student = student.detach().requires_grad_()
            value = loss({"p3": student}, {"p3": teacher}, context)["p3"]
            (gradient,) = torch.autograd.grad(value, student)
            student = student - 0.2 * student.numel() * gradient
        ends[loss.name] = value.item()
    assert ends["ms_ssim"] < 2 * ends["ssim"] + 1e-3


def test_the_mean_of_the_scales_where_all_are_below_the_floor():
    teacher = related_maps(1, 1, 10, 10)[0]
    student = 1 - teacher
    value = on_one_level(student, teacher, window_size=3)
    means = scale_means(student[0, 0].numpy(), teacher[0, 0].numpy(), 3, window_size=3)
    assert max(means) < 0.1
    expected = sum(e * m for e, m in zip(WANG, means)) / sum(WANG[:3])
    assert value.item() == pytest.approx((1 - expected) / 2, rel=1e-9)


def test_the_similarity_grows_with_that_of_every_scale():
    values = torch.linspace(-1, 1, 20).double()  # the floor is not among them
    means = [x.requires_grad_() for x in torch.meshgrid(values, values, values, indexing="ij")]
    exponents = [0.1, 0.6, 0.3]
    found = combine(means, exponents)
    assert found.min() == -1 and found.max() == 1
    for mean, exponent, slope in zip(means, exponents, torch.autograd.grad(found.sum(), means)):
        assert (slope >= 0.1 * exponent).all()
        assert torch.allclose(slope[mean < 0.1], torch.tensor(exponent).double())
