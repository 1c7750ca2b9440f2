import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from ssimkd.losses import Context, FGDLoss
from ssimkd.losses.attention import channel_attention, spatial_attention
from ssimkd.losses.fgd import foreground_mask

STRIDE = 8
SIZES = [(32, 40), (17, 24), (32, 40), (25, 9)]  # pixels; 4 x 5, 3 x 3, 4 x 5 and 4 x 2 cells
BOXES = [[[3, 5, 18, 20], [8, 8, 24, 30]], [], [[0, 0, 40, 32]], [[2.5, 9, 9, 25]]]  # pixels
COEFFICIENTS = dict(foreground=0.7, background=0.3, attention=0.2, relation=0.1)
ONLY = {name: {k: float(k == name) for k in COEFFICIENTS} for name in COEFFICIENTS}


def targets(sizes, boxes):
    instances = []
    for size, image_boxes in zip(sizes, boxes):
        instances.append(Instances(size))
        instances[-1].gt_boxes = Boxes(torch.tensor(image_boxes).reshape(-1, 4))
    return instances


def batch(sizes=SIZES, boxes=BOXES, channels=4, seed=0):
    """Random maps of one level p3, padded to the largest image, and their context."""
    generator = torch.Generator().manual_seed(seed)
    h, w = (math.ceil(max(size[axis] for size in sizes) / STRIDE) for axis in (0, 1))
    maps = torch.randn(2, len(sizes), channels, h, w, generator=generator, dtype=torch.float64)
    context = Context(sizes, {"p3": STRIDE}, targets(sizes, boxes))
    return {"p3": maps[0].requires_grad_()}, {"p3": maps[1]}, context


def make(channels=4, trained=True, seed=0, **options):
    """A loss for the level p3; its parameters are random where `trained`, else as at the start."""
    loss = FGDLoss(**options)
    torch.manual_seed(seed)
    loss.attach({"p3": channels}, num_classes=4)
    for parameter in loss.parameters():
        if trained:
            torch.nn.init.normal_(parameter)
    return loss.double()


# --- an independent reference ---


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference_context(block, x):
    """GC block of one map (C, h, w), from its parameters."""
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
    """Mean over images of the formula, each cut out."""
    total, t = 0.0, loss.temperature
    for image, (height, width) in enumerate(context.image_sizes):
        h, w = math.ceil(height / STRIDE), math.ceil(width / STRIDE)
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
    return total / len(context.image_sizes)


@pytest.mark.parametrize("options", [COEFFICIENTS, *ONLY.values()], ids=str)
def test_a_padded_batch_equals_the_reference(options):
    loss = make(temperature=0.4, **options)
    value = loss(*batch())["p3"].item()
    assert value == pytest.approx(reference(loss, *batch()), rel=1e-10)
    assert value > 0.01


def test_a_padded_batch_is_the_mean_of_its_images():
    loss = make(**COEFFICIENTS)
    student, teacher, context = batch()
    alone = []
    for image, (height, width) in enumerate(SIZES):
        h, w = math.ceil(height / STRIDE), math.ceil(width / STRIDE)
        maps = ({"p3": m["p3"][image : image + 1, :, :h, :w]} for m in (student, teacher))
        sizes, objects = SIZES[image : image + 1], context.targets[image : image + 1]
        alone.append(loss(*maps, Context(sizes, context.strides, objects))["p3"])
    torch.testing.assert_close(loss(student, teacher, context)["p3"], torch.stack(alone).mean())


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("boxes", [[], [[1, 1, 5, 6]]], ids=["empty", "one box"])
def test_small_maps_equal_the_reference(h, w, boxes):
    loss = make(**COEFFICIENTS)
    small = batch([(h * STRIDE, w * STRIDE)], [boxes])
    assert loss(*small)["p3"].item() == pytest.approx(reference(loss, *small), rel=1e-10)


# --- reductions to known cases ---


def whole(boxes=([], [])):
    """Two images of 32 x 40 pixels that fill their maps of 4 x 5 cells."""
    return batch([(32, 40)] * 2, boxes)


@pytest.mark.parametrize(
    ("name", "boxes", "cells"),
    [
        ("background", ([], []), 20),  # 4 x 5 cells, all of them background
        ("foreground", ([[0, 0, 40, 32]],) * 2, 30),  # rows 0..4 and columns 0..5: 5 x 6
        ("relation", ([], []), 1),  # the blocks start as the identity
    ],
)
def test_without_attention_each_term_is_a_squared_error(name, boxes, cells):
    student, teacher, context = whole(boxes)
    loss = make(trained=False, temperature=1e12, **ONLY[name])  # every cell and channel weighs 1
    squares = F.mse_loss(student["p3"], teacher["p3"], reduction="sum") / 2  # images
    torch.testing.assert_close(loss(student, teacher, context)["p3"], squares / cells)


def test_a_background_without_cells_costs_nothing():
    assert make(**ONLY["background"])(*whole(([[0, 0, 40, 32]],) * 2))["p3"] == 0
    assert make(**ONLY["foreground"])(*whole())["p3"] == 0


def test_attention_has_mean_one_and_follows_the_active_cell():
    maps = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    maps[0, 1, 0, 1] = -2 * math.log(3)  # mean over channels log 3, over cells log(3) / 2
    expected = torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64) * 4 / 6
    torch.testing.assert_close(spatial_attention(maps, 1.0), expected[None, None])
    expected = torch.tensor([1.0, 3.0], dtype=torch.float64) * 2 / 4
    torch.testing.assert_close(channel_attention(maps, 0.5).flatten(), expected)


def test_foreground_mask_by_hand():
    boxes = torch.tensor([[1.0, 0.2, 2.0, 1.0], [1.5, 1.0, 3.1, 9.0]])
    # the first: columns 1..2, rows 0..1: 1 / 4; the second: columns 1..4, rows 1..9: 1 / 36, cut
    expected = torch.tensor([[0, 9, 9, 0], [0, 9, 9, 1], [0, 1, 1, 1]]) / 36
    torch.testing.assert_close(foreground_mask(boxes, (3, 4)), expected)
    assert torch.equal(foreground_mask(boxes[:0], (3, 4)), torch.zeros(3, 4))


def test_equal_maps_cost_nothing_at_the_start():
    _, teacher, context = batch()
    student = {"p3": teacher["p3"].clone().requires_grad_()}
    value = make(trained=False, **COEFFICIENTS)(student, teacher, context)["p3"]
    (gradient,) = torch.autograd.grad(value, student["p3"])
    assert value == 0 and gradient.abs().max() < 1e-12


def test_defaults_follow_the_authors():
    student, teacher, context = batch()
    terms = {name: make(**only)(student, teacher, context)["p3"] for name, only in ONLY.items()}
    weights = dict(foreground=5e-5, background=2.5e-5, attention=5e-5, relation=5e-7)
    expected = sum(weights[name] * term for name, term in terms.items())
    torch.testing.assert_close(make()(student, teacher, context)["p3"], expected)


# --- gradients ---


def test_gradients_are_those_of_finite_differences():
    sizes, boxes = [(16, 24), (16, 9)], [[[2, 3, 9, 10]], []]
    student, teacher, context = batch(sizes, boxes)
    loss = make(**COEFFICIENTS)

    def value(maps, *_):
        return loss({"p3": maps}, teacher, context)["p3"]

    assert torch.autograd.gradcheck(value, (student["p3"], *loss.parameters()))


@pytest.mark.parametrize("boxes", [[[], []], [[[2, 3, 9, 10]], []]], ids=["empty", "one box"])
def test_every_parameter_learns_after_the_first_step(boxes):
    student, teacher, context = batch([(32, 40), (17, 24)], boxes)
    loss = make(trained=False, **COEFFICIENTS)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    loss(student, teacher, context)["p3"].backward()
    for name, parameter in loss.named_parameters():
        # a last layer of zeros lets nothing through to what comes before it
        assert (parameter.grad.abs().max() > 0) == ("add.3" in name), name
    optimizer.step()
    optimizer.zero_grad()
    loss(student, teacher, context)["p3"].backward()
    for name, parameter in loss.named_parameters():
        assert parameter.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("mask_padding", [True, False])
def test_every_parameter_takes_part_in_every_step(mask_padding):
    student, teacher, context = batch([(8, 8)], [[]])
    context.mask_padding = mask_padding
    loss = make(trained=False)
    loss(student, teacher, context)["p3"].backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())


# --- errors ---


def test_no_ground_truth_is_an_error_that_names_the_key():
    student, teacher, context = batch()
    context.targets = None
    with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.LOSSES: fgd .*ground truth"):
        make()(student, teacher, context)


@pytest.mark.parametrize("name", ["temperature", *COEFFICIENTS])
def test_options_out_of_their_range(name):
    with pytest.raises(ValueError, match=f"{name} must be .*-1"):
        FGDLoss(**{name: -1.0})
