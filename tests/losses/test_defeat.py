import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from ssimkd.losses import Context, DeFeatLoss
from ssimkd.losses.defeat import box_cells, level_ranks
from test_losses import SIZES, STRIDES, equal_batch, padded_batch
from torch.autograd import gradcheck


def targets(sizes, boxes):
    """Ground truth of images of `sizes` pixels; `boxes` holds a list of boxes for each."""
    images = []
    for size, image in zip(sizes, boxes):
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor(image, dtype=torch.float32).view(-1, 4))
        images.append(instances)
    return images


def one_image(maps, size, boxes, strides):
    """The context of one image with `boxes`, whose maps are those given."""
    assert all(x.shape[0] == 1 for x in maps.values())
    return Context([size], strides, targets([size], [boxes]))


# --- reference: the authors' loops over images, boxes and cells, in their order ---


def reference_owner(box, levels):
    scale = math.sqrt((box[2] - box[0] + 1) * (box[3] - box[1] + 1))
    return min(max(math.floor(math.log2(scale / 56 + 1e-6)), 0), levels - 1)


def reference_mask(boxes, rank, levels, stride, height, width):
    mask = np.zeros((height, width), dtype=bool)
    for box in boxes:
        if reference_owner(box, levels) != rank:
            continue
        left, top = max(int(box[0] / stride), 0), max(int(box[1] / stride), 0)
        right, bottom = min(int(box[2] / stride), width), min(int(box[3] / stride), height)
        if left == right or top == bottom:
            mask[top, left] = True
        else:
            mask[top:bottom, left:right] = True
    return mask


def reference(student, teacher, context, foreground, background):
    """Level -> loss, cells outside an image skipped."""
    order = sorted(context.strides, key=context.strides.get)
    losses = {}
    for level, s in student.items():
        sums, counts = [0.0, 0.0], [0, 0]  # of background and objects
        for n, (h, w) in enumerate(context.cells(level, s)):
            boxes = context.targets[n].gt_boxes.tensor.tolist()
            rank, stride = order.index(level), context.strides[level]
            mask = reference_mask(boxes, rank, len(student), stride, *s.shape[-2:])
            for c, i, j in np.ndindex(s.shape[1], h, w):
                region = int(mask[i, j])
                sums[region] += (s[n, c, i, j] - teacher[level][n, c, i, j]).item() ** 2
                counts[region] += 1
        back, fore = (x / max(1, 2 * n) for x, n in zip(sums, counts))
        losses[level] = (foreground * fore + background * back) / len(student)
    return losses


BOXES = [
    [[3, 5, 70, 60], [10, 10, 90, 62], [0, 0, 80, 64]],  # they overlap
    [[9.5, 8.1, 9.9, 8.7], [40, 16, 47.9, 39]],  # thinner than a cell, wholly and in one direction
    [],
    [[0, 0, 17, 33]],
]


@pytest.mark.parametrize("batch", ["padded", "whole"])
def test_equals_the_authors_loops(batch):
    student, teacher, context = padded_batch()
    if batch == "whole":
        context = Context([(64, 96)] * 4, STRIDES)
    context.targets = targets(context.image_sizes, BOXES)
    losses = DeFeatLoss()(student, teacher, context)
    assert losses.keys() == student.keys()
    for level, expected in reference(student, teacher, context, 3.0, 12.0).items():
        assert losses[level].item() == pytest.approx(expected, rel=1e-12)


def test_objects_go_to_the_level_of_their_size():
    strides = {"p4": 16, "p2": 4, "p3": 8}  # the order of the levels does not matter
    size = (256, 320)
    shapes = {level: (1, 2, size[0] // s, size[1] // s) for level, s in strides.items()}
    torch.manual_seed(0)
    student, teacher = (
        {level: torch.randn(shape, dtype=torch.float64) for level, shape in shapes.items()}
        for _ in range(2)
    )
    boxes = [[0, 0, 110, 110], [20, 20, 131, 131], [100, 40, 322, 262], [0, 0, 319, 255]]
    context = one_image(student, size, boxes, strides)
    losses = DeFeatLoss()(student, teacher, context)
    for level, expected in reference(student, teacher, context, 3.0, 12.0).items():
        assert losses[level].item() == pytest.approx(expected, rel=1e-12)


def test_level_ranks():
    # Sides with both end pixels counted: 111, 112 and 223, 224 are the limits; sqrt(56 * 224) = 112
    sides = [(1, 1), (111, 111), (112, 112), (223, 223), (224, 224), (56, 224), (2000, 2000)]
    boxes = torch.tensor([[5.0, 7.0, 4.0 + w, 6.0 + h] for w, h in sides])
    assert level_ranks(boxes, 5).tolist() == [0, 0, 1, 1, 2, 1, 4]  # 2000 / 56 = 35.7 >= 2^4
    assert level_ranks(boxes, 2).tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert level_ranks(boxes, 1).tolist() == [0] * 7
    assert level_ranks(boxes[:0], 5).tolist() == []


def test_a_side_that_rounding_leaves_below_its_limit_has_reached_it():
    corners = 100 * torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corners, corners + 111], dim=1)  # 112 with both end pixels, but for rounding
    sides = (boxes[:, 2:] - boxes[:, :2] + 1).prod(dim=1).sqrt()
    assert (sides < 112).any() and (sides > 112).any()
    owners = level_ranks(boxes, 5).tolist()
    assert owners == [reference_owner(box, 5) for box in boxes.tolist()] == [1] * 500


def test_box_cells():
    boxes = torch.tensor(
        [
            [8.0, 0.0, 24.0, 15.9],  # columns 1, 2 of row 0: 15.9 / 8 = 1.99 -> 1
            [33.0, 17.0, 60.0, 22.0],  # no row is left: the first cell alone, row 2, column 4
            [-9.0, 25.0, 9.0, 99.0],  # beyond the map on both sides: column 0 of row 3
        ]
    )
    expected = torch.zeros(4, 6, dtype=torch.bool)
    for row, column in [(0, 1), (0, 2), (2, 4), (3, 0)]:
        expected[row, column] = True
    assert torch.equal(box_cells(boxes / 8, torch.tensor([True] * 3), (4, 6)), expected)
    expected[2, 4] = False
    assert torch.equal(box_cells(boxes / 8, torch.tensor([True, False, True]), (4, 6)), expected)
    assert not box_cells(boxes[:0], torch.tensor([], dtype=torch.bool), (4, 6)).any()


def test_without_objects_all_is_background():
    student, teacher, context = equal_batch()
    context.targets = targets(context.image_sizes, [[], []])
    losses = DeFeatLoss(foreground_weight=5.0, background_weight=3.0)(student, teacher, context)
    for level, value in losses.items():  # two levels, and the authors' 1/2
        known = F.mse_loss(student[level], teacher[level])
        torch.testing.assert_close(value, 3 * known / 2 / 2)


def test_an_object_all_over_leaves_no_background():
    student, teacher, _ = equal_batch()
    maps = {"p3": student["p3"][:1]}, {"p3": teacher["p3"][:1]}
    context = one_image(maps[0], (64, 96), [[0, 0, 96, 64]], {"p3": 8})
    value = DeFeatLoss(foreground_weight=5.0, background_weight=3.0)(*maps, context)["p3"]
    torch.testing.assert_close(value, 5 * F.mse_loss(maps[0]["p3"], maps[1]["p3"]) / 2)


def test_a_padded_image_equals_the_image_alone():
    student, teacher, _ = padded_batch()
    size, boxes = SIZES[1], [[3, 5, 50, 33], [60, 3, 79, 39]]
    padded = [{level: x[1:2] for level, x in maps.items()} for maps in (student, teacher)]
    alone = []
    for maps in padded:
        cells = {level: [math.ceil(n / s) for n in size] for level, s in STRIDES.items()}
        alone.append(
            {level: x[..., : cells[level][0], : cells[level][1]] for level, x in maps.items()}
        )
    context = one_image(padded[0], size, boxes, STRIDES)
    torch.testing.assert_close(DeFeatLoss()(*padded, context), DeFeatLoss()(*alone, context))


def test_offset_of_both_maps_does_not_matter_and_scale_counts_squared():
    student, teacher, context = padded_batch()
    moved = [{level: 3 * x + 7 for level, x in maps.items()} for maps in (student, teacher)]
    expected = {level: 9 * x for level, x in DeFeatLoss()(student, teacher, context).items()}
    torch.testing.assert_close(DeFeatLoss()(*moved, context), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 3)])
@pytest.mark.parametrize("boxes", [[], [[0, 0, 7, 7]], [[3, 3, 4, 4], [0, 0, 30, 20]]])
def test_small_and_flat_maps(size, boxes):
    student = torch.full((1, 2, *size), 2.0, requires_grad=True)
    teacher = torch.full((1, 2, *size), 5.0)
    pixels = (8 * size[0], 8 * size[1])
    context = one_image({"p3": student}, pixels, boxes, {"p3": 8})
    value = DeFeatLoss()({"p3": student}, {"p3": teacher}, context)["p3"]
    (gradient,) = torch.autograd.grad(value, student)
    # Every squared error is 9, so that each mean is 9 or, of no cells, 0
    objects = reference_mask(boxes, 0, 1, 8, *size)
    fore, back = objects.any() * 9, (~objects).any() * 9
    assert value.item() == pytest.approx((3 * fore + 12 * back) / 2)
    # d/dS of a mean over n cells and 2 channels: 2 (S - T) / (2 n), S - T = -3
    each = torch.where(
        torch.from_numpy(objects), 3 / max(1, objects.sum()), 12 / max(1, (~objects).sum())
    )
    torch.testing.assert_close(gradient, (each * -3 / 2).float().expand_as(gradient))


def test_gradients():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 2, 2, 3, dtype=torch.float64)
    sizes = [(16, 24), (8, 17)]
    context = Context(sizes, {"p3": 8}, targets(sizes, [[[0, 0, 16, 8]], []]))

    def loss(s):
        return DeFeatLoss()({"p3": s}, {"p3": teacher}, context)["p3"]

    assert gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("name", ["foreground_weight", "background_weight"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_weights_must_not_be_negative(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0"):
        DeFeatLoss(**{name: value})
