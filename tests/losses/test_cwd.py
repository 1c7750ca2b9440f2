import math

import numpy as np
import pytest
import torch
from loss_cases import batch, softmax
from ssimkd.losses import Context, CWDLoss


def divergence(student, teacher, cells, tau):
    """The loss of one level in NumPy, one image and channel after the other."""
    total = 0.0
    for s, t, (h, w) in zip(student.detach().numpy(), teacher.numpy(), cells):
        for channel in range(len(s)):
            p, q = (softmax(x[channel, :h, :w] / tau) for x in (t, s))
            total += tau**2 * (p * np.log(p / q)).sum()
    return total / (student.shape[0] * student.shape[1])


def on_whole_maps(student, teacher, tau=1.0):
    context = Context([tuple(student.shape[-2:])] * len(student), {"p3": 1})
    return CWDLoss(tau=tau)({"p3": student}, {"p3": teacher}, context)["p3"]


@pytest.mark.parametrize("tau", [0.5, 4.0])
def test_equals_the_divergence_of_the_channels(tau):
    student, teacher, context = batch()
    for level, value in CWDLoss(tau=tau)(student, teacher, context).items():
        cells = context.cells(level, student[level])
        expected = divergence(student[level], teacher[level], cells, tau)
        assert value.item() == pytest.approx(expected, rel=1e-10)


def test_a_large_temperature_leaves_half_the_variance_of_the_difference():
    student, teacher = (maps["p3"] for maps in batch()[:2])
    expected = (teacher - student).var(dim=(2, 3), unbiased=False).mean() / 2
    torch.testing.assert_close(on_whole_maps(student, teacher, 1e4), expected, rtol=1e-3, atol=0)


def test_offsets_do_not_matter_and_tau_is_in_feature_units():
    student, teacher = (maps["p3"] for maps in batch()[:2])
    found = on_whole_maps(5 * student + 7, 5 * teacher, tau=5 * 0.7)
    torch.testing.assert_close(found, 25 * on_whole_maps(student, teacher, tau=0.7))


@pytest.mark.parametrize("offset", [0.0, -200.0])
def test_flat_maps_and_distant_logits_stay_finite(offset):
    teacher, student = torch.zeros(2, 1, 2, 2, 3)
    student[..., 0] = offset  # exp(-200) is 0 in float32
    student.requires_grad_()
    value = on_whole_maps(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    # p = 1/6 everywhere; q = 1/4, but exp(offset) / 4 in the two cells of the first column
    expected = 0.0 if offset == 0 else math.log(4 / 6) - 2 * offset / 6
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(gradient).all()
