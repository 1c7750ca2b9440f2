import math

import numpy as np
import pytest
import torch
from ssimkd.losses import Context, FKDLoss
from ssimkd.losses.blocks import NonLocal, by_cell

STRIDE = 8
SIZES = [(32, 40), (17, 24), (32, 40), (25, 9)]  # pixels; 4 x 5, 3 x 3, 4 x 5 and 4 x 2 cells
COEFFICIENTS = dict(feature=0.7, channel=0.3, spatial=0.2, non_local=0.1)
ONLY = {name: {k: float(k == name) for k in COEFFICIENTS} for name in COEFFICIENTS}


def batch(sizes=SIZES, channels=4, seed=0):
    """Random maps of one level p3, padded to the largest image, and their context."""
    generator = torch.Generator().manual_seed(seed)
    h, w = (math.ceil(max(size[axis] for size in sizes) / STRIDE) for axis in (0, 1))
    maps = torch.randn(2, len(sizes), channels, h, w, generator=generator, dtype=torch.float64)
    return {"p3": maps[0].requires_grad_()}, {"p3": maps[1]}, Context(sizes, {"p3": STRIDE})


def make(channels=4, trained=True, **options):
    """A loss for the level p3; its parameters are random where `trained`, else as at the start."""
    loss = FKDLoss(**options)
    torch.manual_seed(0)
    loss.attach({"p3": channels}, num_classes=4)
    for parameter in loss.parameters():
        if trained:
            torch.nn.init.normal_(parameter)
    return loss.double()


def agree(loss):
    """Gives a loss the parameters that equal maps ask for."""
    parts = loss.parts["p3"]
    for name in ("feature", "spatial"):
        torch.nn.init.dirac_(parts[name].weight)
        torch.nn.init.zeros_(parts[name].bias)
    for name in ("channel", "relation"):
        torch.nn.init.eye_(parts[name].weight)
        torch.nn.init.zeros_(parts[name].bias)
    parts["student"].load_state_dict(parts["teacher"].state_dict())
    return loss


# --- an independent reference ---


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def affine(layer, x):
    """conv1x1 or linear of (C, ...)."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    weight = weight.reshape(weight.shape[:2])
    return np.tensordot(weight, x, 1) + bias.reshape(-1, *[1] * (x.ndim - 1))


def pool(x, size):
    """Maxima of whole windows; a map smaller than a window is one."""
    (_, h, w), ry, rx = x.shape, min(size, x.shape[1]), min(size, x.shape[2])
    return np.array(
        [
            x[:, row : row + ry, column : column + rx].max(axis=(1, 2))
            for row in range(0, h - ry + 1, ry)
            for column in range(0, w - rx + 1, rx)
        ]
    )  # (windows, C)


def reference_non_local(block, images):
    """The block's maps: the relation of every cell with every window, then BN over all images."""
    sums = []
    for x in images:
        query = affine(block.query, x)
        keys = pool(affine(block.key, x), block.pool_size)
        values = pool(affine(block.value, x), block.pool_size)
        related = np.zeros((len(query), *x.shape[1:]))
        for row in range(x.shape[1]):
            for column in range(x.shape[2]):
                for key, value in zip(keys, values):
                    similarity = query[:, row, column] @ key / len(keys)
                    related[:, row, column] += similarity * value
        sums.append(np.tensordot(block.out.weight.detach().numpy(), related, 1))
    cells = np.concatenate([x.reshape(len(x), -1) for x in sums], axis=1)
    mean, deviation = cells.mean(axis=1), np.sqrt(cells.var(axis=1) + 1e-5)
    scale, shift = block.scale.detach().numpy(), block.shift.detach().numpy()
    shape = (-1, 1, 1)
    return [
        x
        + (y - mean.reshape(shape)) / deviation.reshape(shape) * scale.reshape(shape)
        + shift.reshape(shape)
        for x, y in zip(images, sums)
    ]


def smooth(layer, x):
    """3 x 3 convolution of one (h, w) map, zeros around."""
    weight = layer.weight.detach().numpy()[0, 0]
    (h, w), padded = x.shape, np.pad(x, 1)
    y = np.zeros((h, w)) + layer.bias.item()
    for row in range(3):
        for column in range(3):
            y += weight[row, column] * padded[row : row + h, column : column + w]
    return y


def reference(loss, student, teacher, context):
    """The formula, image by image."""
    parts, temperature, pairs = loss.parts["p3"], loss.temperature, []
    for image, size in enumerate(context.image_sizes):
        h, w = (math.ceil(pixels / STRIDE) for pixels in size)
        pairs.append([m["p3"][image, :, :h, :w].detach().numpy() for m in (student, teacher)])
    squares = np.zeros(4)
    for x, y in pairs:
        space = [m[0].size * softmax(np.abs(m).mean(axis=0) / temperature) for m in (x, y)]
        attention = (space[0] + space[1]) / 2
        if loss.channel_attention:
            channel = [len(m) * softmax(np.abs(m).mean(axis=(1, 2)) / temperature) for m in (x, y)]
            attention = attention * ((channel[0] + channel[1]) / 2).reshape(-1, 1, 1)
        squares[0] += (attention * (y - affine(parts["feature"], x)) ** 2).sum()
        gap = y.mean(axis=(1, 2)) - affine(parts["channel"], x.mean(axis=(1, 2)))
        squares[1] += (gap**2).sum()
        squares[2] += ((y.mean(axis=0) - smooth(parts["spatial"], x.mean(axis=0))) ** 2).sum()
    related = reference_non_local(parts["student"], [x for x, _ in pairs])
    wanted = reference_non_local(parts["teacher"], [y for _, y in pairs])
    for x, y in zip(related, wanted):
        squares[3] += ((y - affine(parts["relation"], x)) ** 2).sum()
    return np.sqrt(squares) @ loss.coefficients


@pytest.mark.parametrize(
    "options",
    [
        COEFFICIENTS,
        *ONLY.values(),
        dict(ONLY["feature"], channel_attention=True),
        dict(ONLY["non_local"], pool_sizes=(1,)),
        dict(ONLY["non_local"], pool_sizes=(2, 8)),
    ],
    ids=str,
)
def test_a_padded_batch_equals_the_reference(options):
    loss = make(temperature=0.4, **options)
    value = loss(*batch())["p3"].item()
    assert value == pytest.approx(reference(loss, *batch()), rel=1e-10)
    assert value > 0.01


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 3), (1, 4)])
def test_small_maps_equal_the_reference(h, w):
    loss = make(**COEFFICIENTS)
    small = batch([(h * STRIDE, w * STRIDE)])
    assert loss(*small)["p3"].item() == pytest.approx(reference(loss, *small), rel=1e-10)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_images_of_a_padded_batch_share_one_square_root(name):
    # the batch of the non-local block's BN is all of them: it is left as it starts, without effect
    loss = make(trained=name != "non_local", **ONLY[name])
    student, teacher, context = batch()
    squares = 0.0
    for image, (height, width) in enumerate(SIZES):
        h, w = math.ceil(height / STRIDE), math.ceil(width / STRIDE)
        maps = ({"p3": m["p3"][image : image + 1, :, :h, :w]} for m in (student, teacher))
        alone = Context(SIZES[image : image + 1], context.strides)
        squares += loss(*maps, alone)["p3"] ** 2
    torch.testing.assert_close(loss(student, teacher, context)["p3"], squares.sqrt())


# --- reductions to known cases ---


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_agreeing_parts_leave_a_euclidean_distance(name):
    student, teacher, context = batch([(32, 40)] * 2)
    s, t = student["p3"], teacher["p3"]
    known = {
        "feature": torch.dist(s, t),
        "channel": torch.dist(s.mean((2, 3)), t.mean((2, 3))),
        "spatial": torch.dist(s.mean(1), t.mean(1)),
        "non_local": torch.dist(s, t),  # the blocks start as the identity
    }
    loss = agree(make(trained=False, temperature=1e12, **ONLY[name]))  # every cell weighs 1
    torch.testing.assert_close(loss(student, teacher, context)["p3"], known[name])


def test_equal_maps_cost_nothing_once_the_parts_agree():
    _, teacher, context = batch()
    student = {"p3": teacher["p3"].clone().requires_grad_()}
    loss = agree(make(**COEFFICIENTS))
    value = loss(student, teacher, context)["p3"]
    value.backward()
    assert value.item() < 1e-12
    gradients = [student["p3"].grad, *(parameter.grad for parameter in loss.parameters())]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_distance_of_exactly_zero_has_slope_zero():
    zeros = {"p3": torch.zeros(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)}
    context = Context([(16, 24)], {"p3": STRIDE})
    value = agree(make(trained=False, **COEFFICIENTS))(zeros, zeros, context)["p3"]
    (gradient,) = torch.autograd.grad(value, zeros["p3"])
    assert value == 0 and gradient.abs().max() == 0


def test_batch_normalisation_is_torchs_over_whole_maps():
    torch.manual_seed(0)
    block = NonLocal(4, 2).double()
    torch.nn.init.normal_(block.scale)
    torch.nn.init.normal_(block.shift)
    maps = batch([(32, 40)] * 3)[0]["p3"]
    norm = torch.nn.BatchNorm2d(4).double()
    norm.weight, norm.bias = block.scale, block.shift
    query, key, value = (layer(maps) for layer in (block.query, block.key, block.value))
    key, value = (torch.nn.functional.max_pool2d(x, 2).flatten(2) for x in (key, value))
    relation = torch.einsum("ncp,nck->npk", query.flatten(2), key) / key.shape[2]
    related = block.out(torch.einsum("npk,nck->npc", relation, value))
    expected = maps + norm(related.transpose(1, 2).unflatten(2, (4, 5)))
    torch.testing.assert_close(block([maps]), by_cell([expected]))


def test_pool_sizes_and_widths_follow_the_levels():
    loss = FKDLoss()
    loss.attach(dict.fromkeys(["p2", "p3", "p4", "p5", "p6"], 256), 4)
    blocks = [(parts["student"], parts["teacher"]) for parts in loss.parts.values()]
    # the authors' blocks: 64 of 256 channels at the two finest levels, 128 at the others
    for pair, expected in zip(blocks, [(8, 64), (4, 64), (2, 128), (2, 128), (2, 128)]):
        assert [(b.pool_size, b.query.out_channels) for b in pair] == [expected] * 2


def test_defaults_follow_the_authors():
    terms = {name: make(**only)(*batch())["p3"] for name, only in ONLY.items()}
    weights = dict(feature=7e-5, channel=4e-3, spatial=4e-3, non_local=7e-5)
    expected = sum(weights[name] * term for name, term in terms.items())
    torch.testing.assert_close(make()(*batch())["p3"], expected)
    assert make().temperature == 0.5


# --- gradients ---


def test_gradients_are_those_of_finite_differences():
    # but for the attention, which passes no gradient: a high temperature makes it constant
    student, teacher, context = batch([(16, 24), (16, 9)])
    loss = make(**COEFFICIENTS, temperature=1e12)

    def value(maps, *_):
        return loss({"p3": maps}, teacher, context)["p3"]

    assert torch.autograd.gradcheck(value, (student["p3"], *loss.parameters()))


def test_the_attention_passes_no_gradient():
    student, teacher, context = batch([(16, 24)])
    loss = agree(make(**ONLY["feature"], trained=False))
    (gradient,) = torch.autograd.grad(loss(student, teacher, context)["p3"], student["p3"])
    weight = loss._root_attention(student["p3"], teacher["p3"])  # as if it were a constant
    fixed = torch.linalg.vector_norm(weight * (teacher["p3"] - student["p3"]))
    torch.testing.assert_close(gradient, torch.autograd.grad(fixed, student["p3"])[0])


def test_every_parameter_learns_after_the_first_step():
    student, teacher, context = batch()
    loss = make(trained=False, **COEFFICIENTS)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    inside = ("query", "key", "value", "out")
    loss(student, teacher, context)["p3"].backward()
    for name, parameter in loss.named_parameters():
        # a scale of zero lets nothing through to what comes before it
        assert (parameter.grad.abs().max() > 0) != any(part in name for part in inside), name
    optimizer.step()
    optimizer.zero_grad()
    loss(student, teacher, context)["p3"].backward()
    for name, parameter in loss.named_parameters():
        assert parameter.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("mask_padding", [True, False])
def test_every_parameter_takes_part_in_every_step(mask_padding):
    student, teacher, context = batch([(8, 8)])
    context.mask_padding = mask_padding
    loss = make(trained=False)
    loss(student, teacher, context)["p3"].backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())


@pytest.mark.parametrize("pool_sizes", [(), (8, 0), (2.5,)])
def test_pool_sizes_out_of_their_range(pool_sizes):
    with pytest.raises(ValueError, match="pool_sizes must be positive integers"):
        FKDLoss(pool_sizes=pool_sizes)


@pytest.mark.parametrize("name", ["temperature", *COEFFICIENTS])
def test_options_out_of_their_range(name):
    with pytest.raises(ValueError, match=f"{name} must be .*-1"):
        FKDLoss(**{name: -1.0})
