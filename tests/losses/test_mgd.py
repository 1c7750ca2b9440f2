import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_cases import SIZES, assert_every_parameter_learns, batch, make_loss, run
from ssimkd.losses import Context

P3 = {"p3": 8}


def make(channels=3, **options):
    return make_loss("mgd", channels, P3, **options)


def maps(sizes=SIZES, channels=3):
    return batch(sizes, [0] * len(sizes), P3, channels)


def identity(loss):
    """Sets the generator to the identity of maps >= 0."""
    for layer in (loss.generators["p3"][0], loss.generators["p3"][2]):
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return loss


# --- an independent reference ---


def convolve(x, layer):
    """A 3 x 3 convolution of (C, h, w) with zeros around the map."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    y = np.zeros((len(weight), h, w)) + bias[:, None, None]
    for row in range(3):
        for column in range(3):
            shifted = padded[:, row : row + h, column : column + w]
            y += np.einsum("oc,chw->ohw", weight[:, :, row, column], shifted)
    return y


def reference(loss, student, teacher, context, seed=7):
    """The formula, image by image, with the mask that the seed gives."""
    torch.manual_seed(seed)
    n, _, height, width = student["p3"].shape
    hidden = torch.rand(n, 1, height, width).numpy() < loss.mask_ratio
    generator, total = loss.generators["p3"], 0.0
    for image, (h, w) in enumerate(context.cells("p3", student["p3"])):
        x, y = (m["p3"][image, :, :h, :w].detach().numpy() for m in (student, teacher))
        seen = np.where(hidden[image, :, :h, :w], 0, x)
        made = convolve(np.maximum(convolve(seen, generator[0]), 0), generator[2])
        total += loss.generation * ((made - y) ** 2).sum()
    return total / n


@pytest.mark.parametrize("mask_ratio", [0.0, 0.45, 0.9])
def test_equals_the_reference(mask_ratio):
    loss = make(generation=0.3, mask_ratio=mask_ratio)
    expected = reference(loss, *maps())
    assert run(loss, *maps())["p3"].item() == pytest.approx(expected, rel=1e-10)


def test_without_a_mask_a_generator_that_changes_nothing_leaves_a_squared_error():
    student, teacher, context = maps([(32, 40)] * 2)
    student = {"p3": student["p3"].abs()}
    value = identity(make(generation=1.0, mask_ratio=0.0))(student, teacher, context)["p3"]
    squares = F.mse_loss(student["p3"], teacher["p3"], reduction="sum") / 2  # images
    torch.testing.assert_close(value, squares)


def test_the_mask_hides_its_share_of_cells_in_all_channels():
    student = {"p3": torch.ones(4, 3, 100, 100, requires_grad=True)}
    teacher = {"p3": torch.zeros(4, 3, 100, 100)}
    context = Context([(800, 800)] * 4, P3)
    loss = identity(make(generation=1.0, mask_ratio=0.3)).float()
    value = run(loss, student, teacher, context)["p3"]
    hidden = torch.autograd.grad(value, student["p3"])[0] == 0
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    # the deviation of the share over 40000 cells is at most 0.5 / 200
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.01)


def test_the_seed_decides_whatever_the_image_sizes():
    loss = make(generation=1.0)
    first, again, other = (run(loss, *maps(), seed=seed) for seed in (1, 1, 2))
    assert first == again and first != other
    states = []
    for sizes in (SIZES, [(64, 96)] * 4):
        run(loss, *maps(sizes))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_every_parameter_learns():
    # The factor is small, so that the first step is short
    assert_every_parameter_learns(make(generation=1e-4, trained=False), maps())


def test_a_mask_of_everything_is_refused():
    for ratio in (1.0, math.nan):
        with pytest.raises(ValueError, match="mask_ratio must be in"):
            make(mask_ratio=ratio)
