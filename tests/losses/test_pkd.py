import numpy as np
import pytest
import torch
from loss_cases import batch
from ssimkd.losses import L2Loss, PKDLoss


def correlation_loss(student, teacher, cells):
    """1 - r in NumPy, channel by channel, over the cells of all images."""
    values = []
    for channel in range(student.shape[1]):
        pair = [
            np.concatenate([m[channel, :h, :w].ravel() for m, (h, w) in zip(x.numpy(), cells)])
            for x in (student.detach(), teacher)
        ]
        values.append(1 - np.corrcoef(*pair)[0, 1])
    return np.mean(values)


def test_equals_one_less_the_correlation_over_the_batch():
    student, teacher, context = batch()
    for level, value in PKDLoss()(student, teacher, context).items():
        cells = context.cells(level, student[level])
        expected = correlation_loss(student[level], teacher[level], cells)
        assert value.item() == pytest.approx(expected, rel=1e-12)


def test_whole_images_equal_the_authors_code_but_for_its_deviation():
    student, teacher, context = batch([(64, 96)] * 2)
    for level, value in PKDLoss()(student, teacher, context).items():
        maps = [x[level].transpose(0, 1).flatten(1) for x in (student, teacher)]
        s, t = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in maps)
        n = maps[0].shape[1]
        torch.testing.assert_close((s - t).square().mean() / 2, value * (n - 1) / n)


def test_one_image_reduces_to_half_the_l2_of_standardised_maps():
    one = batch([(40, 80)])
    known = L2Loss(normalize="standardize", normalize_scope="channel")(*one)
    torch.testing.assert_close(PKDLoss()(*one), {level: x / 2 for level, x in known.items()})


def test_scale_and_offset_of_a_channel_do_not_matter_and_opposite_maps_cost_two():
    student, teacher, context = batch()
    moved = {level: 300 * x + 5 for level, x in student.items()}
    expected = PKDLoss()(student, teacher, context)
    torch.testing.assert_close(PKDLoss()(moved, teacher, context), expected)
    for value in PKDLoss()({k: 3 - x for k, x in teacher.items()}, teacher, context).values():
        assert value.item() == pytest.approx(2, rel=1e-12)


def test_constant_channels_cost_one_half_or_nothing_without_gradient():
    student, teacher, context = batch()
    flat = {level: torch.full_like(x, 0.3).requires_grad_() for level, x in student.items()}
    losses = PKDLoss()(flat, teacher, context)
    both = PKDLoss()(flat, {level: torch.full_like(x, 7) for level, x in teacher.items()}, context)
    for level, x in flat.items():
        assert losses[level].item() == pytest.approx(0.5)
        assert both[level] == 0
        assert not torch.autograd.grad(losses[level], x)[0].any()
