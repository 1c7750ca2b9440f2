import numpy as np
import pytest
import torch
from loss_cases import assert_every_parameter_learns, batch, make_loss, softmax

P3 = {"p3": 8}
SIZES = [(32, 40), (17, 24), (32, 40), (25, 9)]  # pixels; 4 x 5, 3 x 3, 4 x 5 and 4 x 2 cells
COEFFICIENTS = dict(feature=0.7, channel=0.3, spatial=0.2, non_local=0.1)
ONLY = {name: {k: float(k == name) for k in COEFFICIENTS} for name in COEFFICIENTS}


def maps(sizes=SIZES):
    return batch(sizes, [0] * len(sizes), P3, channels=4)


def make(**options):
    return make_loss("fkd", 4, P3, **options)


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


def affine(layer, x):
    """conv1x1 or linear of (C, ...)."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    weight = weight.reshape(weight.shape[:2])
    return np.tensordot(weight, x, 1) + bias.reshape(-1, *[1] * (x.ndim - 1))


def pool(x, size):
    """Maxima of whole windows, (windows, C). A map smaller than a window is one window."""
    (_, h, w), ry, rx = x.shape, min(size, x.shape[1]), min(size, x.shape[2])
    return np.array(
        [
            x[:, row : row + ry, column : column + rx].max(axis=(1, 2))
            for row in range(0, h - ry + 1, ry)
            for column in range(0, w - rx + 1, rx)
        ]
    )


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
    shape = (-1, 1, 1)
    mean, deviation = cells.mean(axis=1), np.sqrt(cells.var(axis=1) + 1e-5)
    scale, shift = (x.detach().numpy().reshape(shape) for x in (block.scale, block.shift))
    mean, deviation = mean.reshape(shape), deviation.reshape(shape)
    return [x + (y - mean) / deviation * scale + shift for x, y in zip(images, sums)]


def smooth(layer, x):
    """A 3 x 3 convolution of one (h, w) map with zeros around it."""
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
    for image, (h, w) in enumerate(context.cells("p3", student["p3"])):
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


@pytest.mark.parametrize("sizes", [SIZES, [(8, 8)], [(8, 30)]], ids=str)
@pytest.mark.parametrize(
    "options",
    [COEFFICIENTS, dict(COEFFICIENTS, channel_attention=True, pool_sizes=(2, 8))],
    ids=["default", "options"],
)
def test_equals_the_reference(sizes, options):
    loss = make(temperature=0.4, **options)
    expected = reference(loss, *maps(sizes))
    assert loss(*maps(sizes))["p3"].item() == pytest.approx(expected, rel=1e-10)


# --- reductions to known cases ---


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_agreeing_parts_leave_a_euclidean_distance(name):
    student, teacher, context = maps([(32, 40)] * 2)
    s, t = student["p3"], teacher["p3"]
    known = {
        "feature": torch.dist(s, t),
        "channel": torch.dist(s.mean((2, 3)), t.mean((2, 3))),
        "spatial": torch.dist(s.mean(1), t.mean(1)),
        "non_local": torch.dist(s, t),  # the blocks start as the identity
    }
    loss = agree(make(trained=False, temperature=1e12, **ONLY[name]))  # every cell weighs 1
    torch.testing.assert_close(loss(student, teacher, context)["p3"], known[name])


def test_equal_maps_cost_nothing_once_the_parts_agree_and_the_gradient_is_finite():
    _, teacher, context = maps()
    for equal in (teacher["p3"], torch.zeros_like(teacher["p3"])):
        student = {"p3": equal.clone().requires_grad_()}
        loss = agree(make(**COEFFICIENTS))
        value = loss(student, {"p3": equal}, context)["p3"]
        value.backward()
        assert value.item() < 1e-12
        for x in (student["p3"], *loss.parameters()):
            assert torch.isfinite(x.grad).all()


def test_the_attention_passes_no_gradient():
    student, teacher, context = maps([(16, 24)])
    loss = agree(make(**ONLY["feature"], trained=False))
    (gradient,) = torch.autograd.grad(loss(student, teacher, context)["p3"], student["p3"])
    weight = loss.root_attention(student["p3"], teacher["p3"])  # a constant
    fixed = torch.linalg.vector_norm(weight * (teacher["p3"] - student["p3"]))
    torch.testing.assert_close(gradient, torch.autograd.grad(fixed, student["p3"])[0])


def test_pool_sizes_and_widths_follow_the_levels():
    loss = make_loss("fkd", 256, ["p2", "p3", "p4", "p5", "p6"])
    blocks = [(parts["student"], parts["teacher"]) for parts in loss.parts.values()]
    # the authors' blocks: 64 of 256 channels at the two finest levels, 128 at the others
    for pair, expected in zip(blocks, [(8, 64), (4, 64), (2, 128), (2, 128), (2, 128)]):
        assert [(b.pool_size, b.query.out_channels) for b in pair] == [expected] * 2


def test_every_parameter_learns():
    assert_every_parameter_learns(make(trained=False, **COEFFICIENTS), maps())
