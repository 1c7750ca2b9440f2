"""What every loss of the registry has to fulfil; a new loss is tested without a change here."""

import math

import pytest
import torch
from any_maps import EXAMPLES, LAYOUTS, layouts, pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import CHANNELS, SIZES, STRIDES, batch, make_loss, mean_over_images, run, targets
from ssimkd.losses import KD_LOSS_REGISTRY, Context, MapLoss
from ssimkd.registry import loss_defaults

NAMES = sorted(name for name, _ in KD_LOSS_REGISTRY)
PLAIN = [name for name in NAMES if not list(make_loss(name).parameters())]
OF_MAPS = [name for name in NAMES if issubclass(KD_LOSS_REGISTRY.get(name), MapLoss)]
WRONG = {  # type of a default -> values that no option takes
    float: [-1.0, math.nan, math.inf],
    int: [-1, 2.5],
    bool: ["no"],
    str: ["unknown"],
    tuple: [(), (-1.0,)],
}

few = settings(max_examples=6, **EXAMPLES)
every_loss = pytest.mark.parametrize("name", NAMES)


def gradients_of(parts, *maps):
    wanted = [x for whose in maps for x in whose.values()]
    return torch.autograd.grad(sum(parts.values()), wanted, retain_graph=True)


# --- values and gradients ---


@pytest.mark.parametrize("name", PLAIN)
def test_equal_maps_cost_nothing(name):
    student, _, context = batch()
    teacher = {level: x.detach().clone() for level, x in student.items()}
    parts = make_loss(name)(student, teacher, context)
    for value in (*parts.values(), *gradients_of(parts, student)):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-10)


@every_loss
def test_a_gradient_reaches_every_level_and_no_map_is_changed(name):
    maps, copies = batch(), batch()
    parts = run(make_loss(name), *maps)
    assert set(STRIDES) <= set(parts) and all(value > 0 for value in parts.values())
    assert all(gradient.any() for gradient in gradients_of(parts, maps[0]))
    for whose in (0, 1):
        assert all(torch.equal(maps[whose][level], copies[whose][level]) for level in STRIDES)


@every_loss
def test_the_weight_is_left_to_the_caller(name):
    heavy, light = make_loss(name, weight=7), make_loss(name, weight=0)
    assert heavy.weight == 7.0
    torch.testing.assert_close(run(heavy, *batch()), run(light, *batch()))


@every_loss
def test_single_precision_agrees_with_double_precision(name):
    student, teacher, context = batch()
    loss = make_loss(name)
    expected = run(loss, student, teacher, context)
    single = [{k: x.detach().float() for k, x in maps.items()} for maps in (student, teacher)]
    for part, value in run(loss.float(), *single, context).items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[part].item(), rel=1e-3)


@pytest.mark.parametrize("name", OF_MAPS)
def test_levels_of_a_map_loss_are_independent(name):
    student, teacher, context = batch()
    loss = make_loss(name)
    for level, value in loss(student, teacher, context).items():
        one = loss({level: student[level]}, {level: teacher[level]}, context)
        torch.testing.assert_close(one, {level: value})


# --- images that differ in size ---


@every_loss
def test_padding_matters_only_without_the_mask(name):
    student, teacher, context = batch()
    loss = make_loss(name)
    others = [
        {k: torch.where(context.inside(k, x), x, 5 * x.detach() + 100) for k, x in maps.items()}
        for maps in (student, teacher)
    ]
    expected, found = run(loss, student, teacher, context), run(loss, *others, context)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    for (level, x), gradient in zip(others[0].items(), gradients_of(found, others[0])):
        assert not gradient[~context.inside(level, x).expand_as(x)].any()
    context.mask_padding = False
    unmasked = run(loss, student, teacher, context), run(loss, *others, context)
    for part in STRIDES:
        assert abs(unmasked[0][part] - unmasked[1][part]) > 1e-6 * abs(unmasked[0][part])


@pytest.mark.parametrize("name", OF_MAPS)
def test_a_batch_is_the_mean_of_its_images_for_a_map_loss(name):
    loss = make_loss(name)
    torch.testing.assert_close(loss(*batch()), mean_over_images(loss, *batch()))


# --- ground truth and small images ---


@every_loss
@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        (SIZES, [2, 1, 0, 3]),
        (SIZES[:2], [0, 0]),
        ([(1, 1)], [0]),  # one cell in each level
        ([(8, 5)], [3]),
    ],
    ids=str,
)
def test_every_parameter_takes_part_in_every_step(name, sizes, counts):
    loss = make_loss(name, trained=False)
    student, teacher, context = batch(sizes, counts)
    for context.mask_padding in (True, False):
        parts = run(loss, student, teacher, context)
        wanted = (*student.values(), *loss.parameters())
        for gradient in torch.autograd.grad(
            sum(parts.values()), wanted
        ):  # raises for a missing one
            assert torch.isfinite(gradient).all()


@every_loss
def test_a_loss_works_without_ground_truth_or_says_that_it_needs_it(name):
    student, teacher, context = batch()
    expected = run(make_loss(name), student, teacher, context)
    context.targets = None
    try:
        found = run(make_loss(name), student, teacher, context)
    except ValueError as error:
        assert f"MODEL.DISTILL.LOSSES: {name} needs the ground truth" in str(error)
    else:
        torch.testing.assert_close(found, expected)


# --- options ---


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        (name, option, value)
        for name in NAMES
        for option, default in loss_defaults(KD_LOSS_REGISTRY.get(name)).items()
        for value in WRONG[type(default)]
    ],
)
def test_a_wrong_option_is_named(name, option, value):
    with pytest.raises(ValueError, match=rf"\b{option} must be .*"):
        KD_LOSS_REGISTRY.get(name)(**{option: value})


# --- any maps ---

shapes = st.tuples(st.integers(1, 2), st.just(CHANNELS), st.integers(1, 13), st.integers(1, 13))


def value_and_gradient(loss, student, teacher, layout="dense"):
    """Of maps (N, C, H, W) on p3 and a part of them on p5, in the memory layout given."""
    student = student.clone().requires_grad_()
    maps = [
        {"p3": LAYOUTS[layout](x), "p5": LAYOUTS[layout](x[:, :, ::4, ::4])}
        for x in (student, teacher)
    ]
    n, _, h, w = student.shape
    sizes = [(8 * h, 8 * w - 3 * i) for i in range(n)]
    context = Context(sizes, STRIDES, targets(sizes, [1] * n), iteration=10**6)
    total = sum(run(loss, *maps, context).values())
    total.backward()
    return total.detach(), student.grad


@every_loss
@few
@given(pair=pairs(shape=shapes, largest=6e4))  # what half precision can hold
def test_value_and_gradient_are_finite(name, pair):
    value, gradient = value_and_gradient(make_loss(name, trained=False).float(), *pair)
    assert value >= -1e-6 and torch.isfinite(value) and torch.isfinite(gradient).all()


@every_loss
@few
@given(pair=pairs(shape=shapes, largest=10.0), layout=layouts)
def test_the_memory_layout_does_not_matter(name, pair, layout):
    loss = make_loss(name, trained=False).float()
    expected, slope = value_and_gradient(loss, *pair)
    value, gradient = value_and_gradient(loss, *pair, layout)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-3)
    tolerance = 1e-2 * float(slope.abs().max()) + 1e-8
    torch.testing.assert_close(gradient, slope, atol=tolerance, rtol=0)
