import math

import numpy as np
import pytest
import torch
from ssimkd.losses import Context, CWDLoss
from test_losses import equal_batch, padded_batch
from torch.autograd import gradcheck


def softmax(x):
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def divergence(student, teacher, cells, tau):
    """The loss of one level by NumPy: one image and channel after the other, padding cut off."""
    total = 0.0
    for s, t, (h, w) in zip(student.numpy(), teacher.numpy(), cells):
        for channel in range(len(s)):
            p, q = (softmax(x[channel, :h, :w] / tau) for x in (t, s))
            total += tau**2 * (p * np.log(p / q)).sum()
    return total / (student.shape[0] * student.shape[1])


def on_one_level(student, teacher, tau=1.0):
    """The loss of maps without padding."""
    height, width = student.shape[-2:]
    context = Context([(height, width)] * len(student), {"p3": 1})
    return CWDLoss(tau=tau)({"p3": student}, {"p3": teacher}, context)["p3"]


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("batch", [equal_batch, padded_batch])
def test_the_divergence_of_the_channels(batch, tau):
    student, teacher, context = batch()
    for level, value in CWDLoss(tau=tau)(student, teacher, context).items():
        cells = context.cells(level, student[level])
        expected = divergence(student[level], teacher[level], cells, tau)
        assert value.item() == pytest.approx(expected, rel=1e-10)


def test_a_flat_teacher_leaves_log_mean_exp_less_mean():
    # KL(uniform || softmax(S)) = log(mean exp S) - mean S
    student = equal_batch()[0]["p3"]
    cells = student.flatten(2)
    expected = cells.logsumexp(2) - math.log(cells.shape[2]) - cells.mean(2)
    flat = torch.full_like(student, 3.0)
    torch.testing.assert_close(on_one_level(student, flat), expected.mean())


def test_a_large_temperature_leaves_half_the_variance_of_the_difference():
    student, teacher = (maps["p3"] for maps in equal_batch()[:2])
    expected = (teacher - student).var(dim=(2, 3), unbiased=False).mean() / 2
    value = on_one_level(student, teacher, tau=1e4)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)


def test_the_offset_of_a_channel_does_not_matter():
    student, teacher, context = padded_batch()
    offset = torch.tensor([-10.0, 0.0, 3.0], dtype=torch.float64).view(3, 1, 1)
    moved = {level: x + offset for level, x in student.items()}
    expected = CWDLoss()(student, teacher, context)
    torch.testing.assert_close(CWDLoss()(moved, teacher, context), expected)


def test_tau_is_in_feature_units():
    student, teacher = (maps["p3"] for maps in equal_batch()[:2])
    scaled = on_one_level(5 * student, 5 * teacher, tau=5 * 0.7)
    torch.testing.assert_close(scaled, 25 * on_one_level(student, teacher, tau=0.7))


def test_one_cell_costs_nothing():
    student, teacher = torch.randn(2, 2, 3, 1, 1)
    value = on_one_level(student.requires_grad_(), teacher)
    assert value == 0
    assert torch.autograd.grad(value, student)[0].abs().max() == 0


@pytest.mark.parametrize("offset", [0.0, -200.0])
def test_flat_maps_and_far_apart_logits_stay_finite(offset):
    teacher = torch.zeros(1, 2, 2, 3)
    student = torch.zeros(1, 2, 2, 3)
    student[..., 0] = offset  # exp(-200) is 0 in float32
    student.requires_grad_()
    value = on_one_level(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    # p = 1/6 everywhere; q = 1/4, but exp(offset) / 4 in the two cells of the first column
    expected = 0.0 if offset == 0 else math.log(4 / 6) - 2 * offset / 6
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(gradient).all()


def test_gradients():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 2, 2, 3, dtype=torch.float64)
    context = Context([(16, 24), (8, 17)], {"p3": 8})  # the second has one row

    def loss(s):
        return CWDLoss(tau=0.5)({"p3": s}, {"p3": teacher}, context)["p3"]

    assert gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_tau_must_be_positive(tau):
    with pytest.raises(ValueError, match="tau must be a finite number > 0"):
        CWDLoss(tau=tau)
