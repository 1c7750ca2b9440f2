import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_cases import SIZES, batch, boxes_as_targets
from ssimkd.losses import DeFeatLoss
from ssimkd.losses.defeat import level_ranks

BOXES = [
    [[3, 5, 70, 60], [10, 10, 90, 62], [0, 0, 80, 64]],  # they overlap
    [[9.5, 8.1, 9.9, 8.7], [40, 16, 47.9, 39]],  # thinner than a cell, wholly and in one direction
    [],
    [[-9, 9, 17, 99]],  # beyond the map on both sides
]


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


def reference(student, teacher, context, foreground=3.0, background=12.0):
    """Level -> loss, without the cells outside an image."""
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


@pytest.mark.parametrize(
    ("sizes", "boxes", "strides"),
    [
        (SIZES, BOXES, {"p3": 8, "p5": 32}),
        # the order of the levels does not matter
        (
            [(256, 320)],
            [[[0, 0, 110, 110], [20, 20, 131, 131], [100, 40, 322, 262], [0, 0, 319, 255]]],
            {"p4": 16, "p2": 4, "p3": 8},
        ),
    ],
    ids=["padded images", "objects of every level"],
)
def test_equals_the_authors_loops(sizes, boxes, strides):
    student, teacher, context = batch(sizes, [0] * len(sizes), strides, channels=2)
    context.targets = boxes_as_targets(sizes, boxes)
    losses = DeFeatLoss()(student, teacher, context)
    assert list(losses) == list(student)
    for level, expected in reference(student, teacher, context).items():
        assert losses[level].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("box", [[], [[0, 0, 96, 64]]], ids=["none", "everywhere"])
def test_no_objects_or_nothing_else_leave_a_mean_squared_error(box):
    student, teacher, context = batch([(64, 96)] * 2, [0, 0], {"p3": 8})
    context.targets = boxes_as_targets([(64, 96)] * 2, [box] * 2)
    loss = DeFeatLoss(foreground_weight=5.0, background_weight=3.0)
    known = F.mse_loss(student["p3"], teacher["p3"])  # halved by the authors
    value = loss(student, teacher, context)["p3"]
    torch.testing.assert_close(value, (5 if box else 3) * known / 2)


def test_levels_of_boxes():
    # Sides with the pixels of both ends: 111, 112 and 223, 224 are the limits; sqrt(56 * 224) = 112
    sides = [(1, 1), (111, 111), (112, 112), (223, 223), (224, 224), (56, 224), (2000, 2000)]
    boxes = torch.tensor([[5.0, 7.0, 4.0 + w, 6.0 + h] for w, h in sides])
    assert level_ranks(boxes, 5).tolist() == [0, 0, 1, 1, 2, 1, 4]  # 2000 / 56 = 35.7 >= 2^4
    assert level_ranks(boxes, 2).tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert level_ranks(boxes, 1).tolist() == [0] * 7
    assert level_ranks(boxes[:0], 5).tolist() == []
