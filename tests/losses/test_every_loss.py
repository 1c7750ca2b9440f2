"""What every loss of the registry has to fulfil; a new loss is tested without a change here."""

import math

import pytest
import torch
from any_maps import EXAMPLES, LAYOUTS, layouts, pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    CHANNELS,
    SIZES,
    STRIDES,
    batch,
    batch_for,
    changed,
    make_loss,
    mean_over_images,
    run,
    targets,
    tensors_of,
)
from ssimkd.losses import KD_LOSS_REGISTRY, Context, MapLoss
from ssimkd.registry import loss_defaults

NAMES = sorted(name for name, _ in KD_LOSS_REGISTRY)
PLAIN = [name for name in NAMES if not list(make_loss(name).parameters())]
OF_HEADS = [name for name in NAMES if "maps" not in KD_LOSS_REGISTRY.get(name)().compares]
OF_MAPS = [name for name in NAMES if issubclass(KD_LOSS_REGISTRY.get(name), MapLoss)]
ONE_CLASS = [dict(classes=1, anchors=2), dict(classes=1, anchors=1)]
WRONG = {  # type of a default -> values that no option takes
    float: [-1.0, math.nan, math.inf],
    int: [-1, 2.5],
    bool: ["no"],
    str: ["unknown"],
    tuple: [(), (-1.0,)],
}

few = settings(max_examples=6, **EXAMPLES)
every_loss = pytest.mark.parametrize("name", NAMES)
every_head = pytest.mark.parametrize("head", [{}, *ONE_CLASS], ids=str)
loss_of_maps = pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_HEADS])


def gradients_of(parts, *sides):
    wanted = [x for side in sides for x in tensors_of(side)]
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.autograd.grad(sum(parts.values()), wanted, **options)


def class_scores(predictions):
    """The logits through which the losses of heads reach a student."""
    heads = [predictions["cross"]] if "cross" in predictions else list(predictions.values())
    return [x.logits for head in heads for x in (head.values() if isinstance(head, dict) else head)]


# --- values and gradients ---


@pytest.mark.parametrize(
    ("name", "head"),
    [(name, {}) for name in PLAIN]
    + [(name, head) for name in OF_HEADS if name in PLAIN for head in ONE_CLASS],
    ids=str,
)
def test_equal_maps_or_predictions_cost_nothing(name, head):
    student, teacher, context = batch_for(name, **head)
    if "cross" in student:
        student["cross"] = student["dense"]
    teacher = changed(student, lambda x: x.detach().clone())
    parts = make_loss(name)(student, teacher, context)
    for value in (*parts.values(), *gradients_of(parts, student)):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-10)


@every_loss
def test_a_gradient_reaches_every_level_and_nothing_is_changed(name):
    given, copies = batch_for(name), batch_for(name)
    parts = run(make_loss(name), *given)
    assert all(value > 0 for value in parts.values())
    assert name in OF_HEADS or set(STRIDES) <= set(parts)
    compared = given[0] if name not in OF_HEADS else class_scores(given[0])
    assert all(gradient.any() for gradient in gradients_of(parts, compared))
    for side, copy in zip(given[:2], copies):
        assert all(map(torch.equal, tensors_of(side), tensors_of(copy)))


@every_loss
def test_the_weight_is_left_to_the_caller(name):
    heavy, light = make_loss(name, weight=7), make_loss(name, weight=0)
    assert heavy.weight == 7.0
    torch.testing.assert_close(run(heavy, *batch_for(name)), run(light, *batch_for(name)))


@every_loss
def test_single_precision_agrees_with_double_precision(name):
    student, teacher, context = batch_for(name)
    loss = make_loss(name)
    expected = run(loss, student, teacher, context)
    single = [changed(side, lambda x: x.detach().float()) for side in (student, teacher)]
    for part, value in run(loss.float(), *single, context).items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[part].item(), rel=1e-3)


@loss_of_maps
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_compared_in_single_precision(name, dtype):
    loss = make_loss(name).float()
    student, teacher, context = batch_for(name)
    half = [changed(side, lambda x: x.detach().to(dtype)) for side in (student, teacher)]
    half[0] = changed(half[0], lambda x: x.requires_grad_())
    found = run(loss, *half, context)
    expected = run(loss, *(changed(side, lambda x: x.float()) for side in half), context)
    for part, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[part], rtol=1e-5, atol=1e-6)
    mixed = run(loss, half[0], changed(half[1], lambda x: x.float()), context)
    torch.testing.assert_close(mixed, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OF_MAPS)
def test_levels_of_a_map_loss_are_independent(name):
    student, teacher, context = batch()
    loss = make_loss(name)
    for level, value in loss(student, teacher, context).items():
        one = loss({level: student[level]}, {level: teacher[level]}, context)
        torch.testing.assert_close(one, {level: value})


# --- images that differ in size ---


@loss_of_maps
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


@loss_of_maps
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


@every_head
@pytest.mark.parametrize("name", OF_HEADS)
@pytest.mark.parametrize(
    ("counts", "proposals"), [([0, 0, 0, 0], (4, 3, 0, 5)), ([2, 1, 0, 3], (0, 0, 0, 0))], ids=str
)
def test_images_without_objects_or_proposals_keep_a_loss_of_heads_finite(
    name, counts, proposals, head
):
    student, teacher, context = batch_for(name, SIZES, counts, proposals, **head)
    parts = run(make_loss(name), student, teacher, context)
    scores = torch.autograd.grad(sum(parts.values()), class_scores(student))  # raises for a missing
    assert all(torch.isfinite(x).all() for x in (*parts.values(), *scores))


@every_head
@pytest.mark.parametrize("name", OF_HEADS)
@pytest.mark.parametrize("factor", [1, 120, -120, 0])
def test_class_scores_of_any_size_keep_a_loss_of_heads_finite(name, factor, head):
    student, teacher, context = batch_for(name, **head)
    student = changed(student, lambda x: x.detach().float().mul(factor).requires_grad_())
    teacher = changed(teacher, lambda x: x.float() * factor)
    parts = run(make_loss(name).float(), student, teacher, context)
    gradients = gradients_of(parts, student)
    assert all(torch.isfinite(x).all() for x in (*parts.values(), *gradients))


@every_loss
def test_a_loss_works_without_ground_truth_or_says_that_it_needs_it(name):
    student, teacher, context = batch_for(name)
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


@loss_of_maps
@few
@given(pair=pairs(shape=shapes, largest=6e4))  # what half precision can hold
def test_value_and_gradient_are_finite(name, pair):
    value, gradient = value_and_gradient(make_loss(name, trained=False).float(), *pair)
    assert value >= -1e-6 and torch.isfinite(value) and torch.isfinite(gradient).all()


@loss_of_maps
@few
@given(pair=pairs(shape=shapes, largest=10.0), layout=layouts)
def test_the_memory_layout_does_not_matter(name, pair, layout):
    loss = make_loss(name, trained=False).float()
    expected, slope = value_and_gradient(loss, *pair)
    value, gradient = value_and_gradient(loss, *pair, layout)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-3)
    tolerance = 1e-2 * float(slope.abs().max()) + 1e-8
    torch.testing.assert_close(gradient, slope, atol=tolerance, rtol=0)
