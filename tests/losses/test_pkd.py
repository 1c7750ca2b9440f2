import numpy as np
import pytest
import torch
from ssimkd.losses import Context, L2Loss, PKDLoss
from test_losses import equal_batch, padded_batch
from torch.autograd import gradcheck


def cells(maps, channel, inside):
    """One channel's values in the cells that lie in an image."""
    return np.concatenate([x[channel][mask[0]] for x, mask in zip(maps.numpy(), inside.numpy())])


def correlation_loss(student, teacher, inside):
    """1 - r by NumPy, channel by channel."""
    channels = range(student.shape[1])
    pairs = [[cells(x, c, inside) for x in (student, teacher)] for c in channels]
    return np.mean([1 - np.corrcoef(*pair)[0, 1] for pair in pairs])


def test_one_less_the_correlation_over_the_batch():
    student, teacher, context = padded_batch()
    losses = PKDLoss()(student, teacher, context)
    for level, value in losses.items():
        inside = context.inside(level, student[level])
        expected = correlation_loss(student[level], teacher[level], inside)
        assert value.item() == pytest.approx(expected, rel=1e-12)


def test_whole_images_equal_the_authors_code_but_for_its_deviation():
    student, teacher, context = equal_batch()
    for level, value in PKDLoss()(student, teacher, context).items():
        maps = [x[level].transpose(0, 1).flatten(1) for x in (student, teacher)]
        s, t = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in maps)
        n = maps[0].shape[1]
        torch.testing.assert_close((s - t).square().mean() / 2, value * (n - 1) / n)


def test_one_image_reduces_to_half_the_l2_of_standardised_maps():
    student, teacher, _ = equal_batch()
    context = Context([(64, 96)], {"p3": 8})
    maps = {"p3": student["p3"][:1]}, {"p3": teacher["p3"][:1]}
    known = L2Loss(normalize="standardize", normalize_scope="channel")(*maps, context)["p3"]
    torch.testing.assert_close(PKDLoss()(*maps, context)["p3"], known / 2)


def test_a_padded_batch_equals_its_cells_side_by_side():
    student, teacher, context = padded_batch()
    losses = PKDLoss()(student, teacher, context)
    for level, value in losses.items():
        maps = []
        for x in (student[level], teacher[level]):
            crops = [
                image[:, :h, :w].flatten(1) for image, (h, w) in zip(x, context.cells(level, x))
            ]
            maps.append({level: torch.cat(crops, dim=1)[None, :, None]})
        pixels = [(1, maps[0][level].shape[-1])]
        together = PKDLoss()(*maps, Context(pixels, {level: 1}))
        torch.testing.assert_close(together[level], value)


def test_scale_and_offset_of_a_channel_do_not_matter():
    student, teacher, context = padded_batch()
    scale = torch.tensor([0.01, 1.0, 300.0], dtype=torch.float64).view(3, 1, 1)
    moved = {level: scale * x + 5 / scale for level, x in student.items()}
    expected = PKDLoss()(student, teacher, context)
    torch.testing.assert_close(PKDLoss()(moved, teacher, context), expected)
    torch.testing.assert_close(PKDLoss()(teacher, moved, context), expected)


def test_opposite_maps_cost_two():
    _, teacher, context = padded_batch()
    losses = PKDLoss()({level: 3 - x for level, x in teacher.items()}, teacher, context)
    for value in losses.values():
        assert value.item() == pytest.approx(2, rel=1e-12)


def test_flat_channels_cost_one_half_or_nothing_without_gradient():
    student, teacher, context = padded_batch()
    flat = {level: torch.full_like(x, 0.3).requires_grad_() for level, x in student.items()}
    losses = PKDLoss()(flat, teacher, context)
    both = PKDLoss()(flat, {level: torch.full_like(x, 7) for level, x in teacher.items()}, context)
    for level, x in flat.items():
        assert losses[level].item() == pytest.approx(0.5)
        assert both[level] == 0
        (gradient,) = torch.autograd.grad(losses[level], x)
        assert gradient.abs().max() == 0


def test_one_cell_has_no_deviation():
    student, teacher = torch.randn(2, 1, 3, 1, 1, dtype=torch.float64)
    student.requires_grad_()
    value = PKDLoss()({"p6": student}, {"p6": teacher}, Context([(30, 40)], {"p6": 64}))["p6"]
    assert value == 0
    assert torch.autograd.grad(value, student)[0].abs().max() == 0


def test_two_cells_agree_or_disagree():
    # Two images of one cell: r is 1 where both channels change alike, else -1
    student = torch.tensor([[1.0, 1.0], [2.0, 5.0]]).view(2, 2, 1, 1)
    teacher = torch.tensor([[0.0, 4.0], [7.0, 3.0]]).view(2, 2, 1, 1)
    context = Context([(30, 40)] * 2, {"p6": 64})
    value = PKDLoss()({"p6": student}, {"p6": teacher}, context)["p6"]
    assert value.item() == pytest.approx((0 + 2) / 2, abs=1e-6)


def test_gradients():
    context = Context([(16, 24), (9, 17)], {"p3": 8})  # 2 x 3 cells both: nothing padded
    padded = Context([(16, 24), (8, 17)], {"p3": 8})
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 2, 2, 3, dtype=torch.float64)
    for each in (context, padded):

        def loss(s, each=each):
            return PKDLoss()({"p3": s}, {"p3": teacher}, each)["p3"]

        assert gradcheck(loss, student.requires_grad_())


def test_single_precision_far_from_zero():
    student, teacher, context = padded_batch()
    expected = PKDLoss()(student, teacher, context)
    single = [{k: (x + 100).float() for k, x in maps.items()} for maps in (student, teacher)]
    for level, value in PKDLoss()(*single, context).items():
        assert value.item() == pytest.approx(expected[level].item(), rel=1e-4)
