import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ssimkd.losses import Context, MGDLoss

STRIDE = 8
SIZES = [(32, 40), (17, 24), (32, 40), (25, 9)]  # pixels; 4 x 5, 3 x 3, 4 x 5 and 4 x 2 cells


def batch(sizes=SIZES, channels=3, seed=0):
    """Random maps of one level p3, padded to the largest image, and their context."""
    generator = torch.Generator().manual_seed(seed)
    h, w = (math.ceil(max(size[axis] for size in sizes) / STRIDE) for axis in (0, 1))
    maps = torch.randn(2, len(sizes), channels, h, w, generator=generator, dtype=torch.float64)
    return {"p3": maps[0].requires_grad_()}, {"p3": maps[1]}, Context(sizes, {"p3": STRIDE})


def make(channels=3, **options):
    loss = MGDLoss(**options)
    torch.manual_seed(0)
    loss.attach({"p3": channels}, num_classes=4)
    return loss.double()


def seeded(loss, maps, seed=5):
    torch.manual_seed(seed)
    return loss(*maps)["p3"]


def identity(loss):
    """Sets the generator to what a ReLU leaves of its input."""
    for layer in (loss.generators["p3"][0], loss.generators["p3"][2]):
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return loss


# --- an independent reference ---


def convolve(x, layer):
    """3 x 3, zeros around: (C, h, w)."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    y = np.zeros((len(weight), h, w)) + bias[:, None, None]
    for row in range(3):
        for column in range(3):
            shifted = padded[:, row : row + h, column : column + w]
            y += np.einsum("oc,chw->ohw", weight[:, :, row, column], shifted)
    return y


def reference(loss, student, teacher, context, seed=5):
    """Mean over images of the formula, each cut out, with the mask that the seed gives."""
    torch.manual_seed(seed)
    n, _, height, width = student["p3"].shape
    hidden = torch.rand(n, 1, height, width).numpy() < loss.mask_ratio
    generator, total = loss.generators["p3"], 0.0
    for image, size in enumerate(context.image_sizes):
        h, w = (math.ceil(pixels / STRIDE) for pixels in size)
        x, y = (m["p3"][image, :, :h, :w].detach().numpy() for m in (student, teacher))
        seen = np.where(hidden[image, :, :h, :w], 0, x)
        made = convolve(np.maximum(convolve(seen, generator[0]), 0), generator[2])
        total += loss.generation * ((made - y) ** 2).sum()
    return total / n


@pytest.mark.parametrize("sizes", [SIZES, [(8, 8)], [(16, 24)] * 2], ids=str)
@pytest.mark.parametrize("mask_ratio", [0.0, 0.45, 0.9])
def test_batches_equal_the_reference(sizes, mask_ratio):
    loss = make(generation=0.3, mask_ratio=mask_ratio)
    expected = reference(loss, *batch(sizes))
    assert seeded(loss, batch(sizes)).item() == pytest.approx(expected, rel=1e-10)


def test_a_padded_batch_is_the_mean_of_its_images():
    loss = make(mask_ratio=0.0)
    student, teacher, context = batch()
    alone = []
    for image, (height, width) in enumerate(SIZES):
        h, w = math.ceil(height / STRIDE), math.ceil(width / STRIDE)
        maps = ({"p3": m["p3"][image : image + 1, :, :h, :w]} for m in (student, teacher))
        alone.append(loss(*maps, Context(SIZES[image : image + 1], context.strides))["p3"])
    torch.testing.assert_close(loss(student, teacher, context)["p3"], torch.stack(alone).mean())


# --- reductions to known cases ---


def test_an_identity_that_sees_all_is_a_squared_error():
    student, teacher, context = batch([(32, 40)] * 2)
    student = {"p3": student["p3"].abs()}  # which a ReLU leaves as it is
    value = identity(make(generation=1.0, mask_ratio=0.0))(student, teacher, context)["p3"]
    squares = F.mse_loss(student["p3"], teacher["p3"], reduction="sum") / 2  # images
    torch.testing.assert_close(value, squares)


def test_equal_maps_cost_nothing_where_the_generator_is_the_identity():
    _, teacher, context = batch()
    maps = {"p3": teacher["p3"].abs()}
    assert identity(make(generation=1.0, mask_ratio=0.0))(maps, maps, context)["p3"] == 0


@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.8])
def test_the_mask_hides_its_share_of_cells_in_all_channels(mask_ratio):
    student = {"p3": torch.ones(4, 3, 100, 100, requires_grad=True)}
    teacher = {"p3": torch.zeros(4, 3, 100, 100)}
    context = Context([(800, 800)] * 4, {"p3": STRIDE})
    loss = identity(make(generation=1.0, mask_ratio=mask_ratio)).float()
    (gradient,) = torch.autograd.grad(seeded(loss, (student, teacher, context)), student["p3"])
    hidden = gradient == 0
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    # the deviation of the share over 40000 cells is at most 0.5 / 200
    assert hidden.float().mean().item() == pytest.approx(mask_ratio, abs=0.01)


def test_the_mask_comes_from_torchs_generator():
    loss = make(generation=1.0)
    first, again, other = (seeded(loss, batch(), seed) for seed in (1, 1, 2))
    assert first == again and first != other
    torch.manual_seed(3)
    loss(*batch([(32, 40)] * 4))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    loss(*batch())  # images of other sizes in a batch of the same size
    assert torch.equal(torch.get_rng_state(), state)


def test_defaults_follow_the_authors():
    loss = make()
    expected = 5e-7 * seeded(make(generation=1.0, mask_ratio=0.45), batch())
    torch.testing.assert_close(seeded(loss, batch()), expected)


# --- gradients ---


def test_gradients_are_those_of_finite_differences():
    student, teacher, context = batch([(16, 24), (16, 9)], channels=2)
    loss = make(channels=2, generation=0.1)

    def value(maps, *_):
        return seeded(loss, ({"p3": maps}, teacher, context))

    assert torch.autograd.gradcheck(value, (student["p3"], *loss.parameters()))


def test_every_parameter_learns_from_the_first_step():
    loss = make(generation=1.0)
    seeded(loss, batch()).backward()
    for name, parameter in loss.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


def test_every_parameter_takes_part_where_everything_is_hidden():
    student, teacher, context = batch([(8, 8)])
    loss = make(mask_ratio=0.999999)
    seeded(loss, (student, teacher, context)).backward()
    assert student["p3"].grad.abs().max() == 0
    assert all(parameter.grad is not None for parameter in loss.parameters())


@pytest.mark.parametrize("options", [{"generation": -1.0}, {"mask_ratio": 1.0}], ids=str)
def test_options_out_of_their_range(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        MGDLoss(**options)
