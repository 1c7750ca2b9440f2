import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_cases import assert_every_parameter_learns, batch, boxes_as_targets, make_loss, softmax

P3, STRIDE = {"p3": 8}, 8
SIZES = [(32, 40), (17, 24), (32, 40), (25, 9)]  # pixels; 4 x 5, 3 x 3, 4 x 5 and 4 x 2 cells
BOXES = [[[3, 5, 18, 20], [8, 8, 24, 30]], [], [[0, 0, 40, 32]], [[2.5, 9, 9, 25]]]  # pixels
COEFFICIENTS = dict(foreground=0.7, background=0.3, attention=0.2, relation=0.1)
ONLY = {name: {k: float(k == name) for k in COEFFICIENTS} for name in COEFFICIENTS}
EVERYWHERE = [[0, 0, 40, 32]]


def maps(sizes=SIZES, boxes=BOXES):
    student, teacher, context = batch(sizes, [0] * len(sizes), P3, channels=4)
    context.targets = boxes_as_targets(sizes, boxes)
    return student, teacher, context


def make(**options):
    return make_loss("fgd", 4, P3, **options)


# --- an independent reference ---


def reference_context(block, x):
    """The block of one map (C, h, w), from its parameters."""
    p = {name: value.detach().numpy() for name, value in block.named_parameters()}
    c = len(x)
    weights = softmax(np.einsum("c,chw->hw", p["attention.weight"].reshape(c), x))
    pooled = np.array([(x[i] * weights).sum() for i in range(c)])
    hidden = p["add.0.weight"] @ pooled + p["add.0.bias"]
    hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
    hidden = np.maximum(hidden * p["add.1.weight"] + p["add.1.bias"], 0)
    return x + (p["add.3.weight"] @ hidden + p["add.3.bias"]).reshape(c, 1, 1)


def reference_masks(boxes, h, w):
    """M_fg and M_bg, cell by cell."""
    foreground = np.zeros((h, w))
    for x0, y0, x1, y1 in boxes:
        columns = range(math.floor(x0 / STRIDE), math.ceil(x1 / STRIDE) + 1)
        rows = range(math.floor(y0 / STRIDE), math.ceil(y1 / STRIDE) + 1)
        for row in rows:
            for column in columns:
                if row < h and column < w:
                    share = 1 / (len(rows) * len(columns))
                    foreground[row, column] = max(foreground[row, column], share)
    background = (foreground == 0).astype(float)
    return foreground, background / max(background.sum(), 1)


def reference(loss, student, teacher, context):
    """The formula, image by image."""
    total, t = 0.0, loss.temperature
    cells = context.cells("p3", student["p3"])
    for image, (h, w) in enumerate(cells):
        x, y = (m["p3"][image, :, :h, :w].detach().numpy() for m in (student, teacher))
        c = len(x)
        space = [h * w * softmax(np.abs(m).mean(axis=0) / t) for m in (x, y)]
        channel = [c * softmax(np.abs(m).mean(axis=(1, 2)) / t) for m in (x, y)]
        boxes = context.targets[image].gt_boxes.tensor.tolist()
        foreground, background = reference_masks(boxes, h, w)
        for i in range(c):
            error = channel[1][i] * space[1] * (x[i] - y[i]) ** 2
            total += loss.foreground * (foreground * error).sum()
            total += loss.background * (background * error).sum()
        gaps = np.abs(space[0] - space[1]).sum() + np.abs(channel[0] - channel[1]).sum()
        total += loss.attention * gaps
        related = reference_context(loss.student_context["p3"], x)
        related = related - reference_context(loss.teacher_context["p3"], y)
        total += loss.relation * (related**2).sum()
    return total / len(cells)


@pytest.mark.parametrize(
    ("sizes", "boxes"),
    [(SIZES, BOXES), ([(8, 8)], [[]]), ([(8, 30)], [[[1, 1, 5, 6]]])],
    ids=["padded", "one cell", "one row"],
)
def test_equals_the_reference(sizes, boxes):
    loss = make(temperature=0.4, **COEFFICIENTS)
    expected = reference(loss, *maps(sizes, boxes))
    assert loss(*maps(sizes, boxes))["p3"].item() == pytest.approx(expected, rel=1e-10)


# --- reductions to known cases ---


@pytest.mark.parametrize(
    ("name", "boxes", "cells"),
    [
        ("background", [], 20),  # 4 x 5 cells, all of them background
        ("foreground", EVERYWHERE, 30),  # rows 0..4 and columns 0..5: 5 x 6
        ("relation", [], 1),  # the blocks start as the identity
    ],
)
def test_without_attention_each_term_is_a_squared_error(name, boxes, cells):
    student, teacher, context = maps([(32, 40)] * 2, [boxes] * 2)
    loss = make(trained=False, temperature=1e12, **ONLY[name])  # every cell and channel weighs 1
    squares = F.mse_loss(student["p3"], teacher["p3"], reduction="sum") / 2  # images
    torch.testing.assert_close(loss(student, teacher, context)["p3"], squares / cells)


def test_a_term_without_cells_costs_nothing():
    assert make(**ONLY["background"])(*maps([(32, 40)], [EVERYWHERE]))["p3"] == 0
    assert make(**ONLY["foreground"])(*maps([(32, 40)], [[]]))["p3"] == 0


def test_equal_maps_cost_nothing_at_the_start():
    _, teacher, context = maps()
    student = {"p3": teacher["p3"].clone().requires_grad_()}
    value = make(trained=False, **COEFFICIENTS)(student, teacher, context)["p3"]
    (gradient,) = torch.autograd.grad(value, student["p3"])
    assert value == 0 and gradient.abs().max() < 1e-12


def test_every_parameter_learns():
    assert_every_parameter_learns(make(trained=False, **COEFFICIENTS), maps())
