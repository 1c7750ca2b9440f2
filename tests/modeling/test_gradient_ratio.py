"""The logged ratio of gradients, against gradients that are taken one at a time."""

import pytest
import torch
from conftest import image_batch
from detectron2.utils.events import EventStorage
from ssimkd.modeling.gradient_ratio import GradientRatio
from ssimkd.modeling.predictions import capture_heads

BATCH = image_batch((96, 96), (96, 128))
LEVELS = ("p2", "p3", "p4", "p5")


def step(model):
    """Forward and backward; the losses and what was logged."""
    torch.manual_seed(5)
    with EventStorage(0) as storage:
        losses = model(BATCH)
        sum(losses.values()).backward()
    return losses, {name: value for name, (value, _) in storage.latest().items()}


def norms_at_the_maps(model, of):
    """Gradient norms by level of the losses whose names `of` selects."""
    maps = {}
    handle = model.backbone.register_forward_hook(lambda *args: maps.update(args[2]))
    torch.manual_seed(5)
    with EventStorage(0):
        losses = model(BATCH)
    handle.remove()
    loss = sum(value for name, value in losses.items() if of(name))
    gradients = torch.autograd.grad(loss, [maps[level] for level in LEVELS])
    return torch.stack([gradient.norm() for gradient in gradients])


def test_the_ratio_is_that_of_separate_gradients(student):
    model = student("MODEL.DISTILL.LOG_GRADIENTS", 1, "MODEL.DISTILL.LOSSES", ("l2", "cwd"))
    _, logged = step(model)
    model.log_gradients = 0
    ours = norms_at_the_maps(model, lambda name: "kd" in name)
    detector = norms_at_the_maps(model, lambda name: "kd" not in name)
    for level, ratio in zip(LEVELS, ours / detector):
        if ratio < float("inf"):  # the detector may have no gradient at a level
            assert logged[f"gradient_ratio/{level}"] == pytest.approx(float(ratio), rel=1e-4)
    assert logged["gradient_ratio"] == pytest.approx(float(ours.norm() / detector.norm()), rel=1e-4)


def test_a_ratio_to_no_gradient_is_left_out():
    with EventStorage(0) as storage:
        ratio = GradientRatio(log=True, report=None)
        maps = {name: torch.ones(1, 1, 2, 2, requires_grad=True) for name in ("p2", "p3")}
        own, distilled = ratio.split_maps(maps)
        loss = own["p2"].sum() + 0 * own["p3"].sum() + distilled["p3"].sum()
        loss.backward()
        assert "gradient_ratio" not in storage.latest()
        assert "gradient_ratio/p3" not in storage.latest()


def test_training_is_the_same_with_the_log(student):
    models = [student("MODEL.DISTILL.LOG_GRADIENTS", period) for period in (0, 1)]
    (losses, silent), (others, logged) = map(step, models)
    assert all(torch.equal(losses[name], others[name]) for name in losses)
    assert "gradient_ratio" in logged and "gradient_ratio" not in silent
    a, b = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in models)
    assert (a - b).norm() < 1e-5 * a.norm()  # gradients are added up in another order


def test_it_is_logged_once_in_so_many_iterations(student):
    model = student("MODEL.DISTILL.LOG_GRADIENTS", 2)
    with EventStorage(0) as storage:
        for _ in range(3):
            sum(model(BATCH).values()).backward()
            storage.step()
    assert [it for _, it in storage.history("gradient_ratio").values()] == [0, 2]


@pytest.mark.parametrize("losses", [("kd",), ("kd", "l2")])
def test_the_ratio_of_predictions_is_that_of_separate_gradients_at_the_heads(student, losses):
    model = student("MODEL.DISTILL.LOG_GRADIENTS", 1, "MODEL.DISTILL.LOSSES", losses)
    values, logged = step(model)
    model.log_gradients = 0
    torch.manual_seed(5)
    with EventStorage(0), capture_heads(model, ["rpn", "roi"]) as outputs:
        values = model(BATCH)
    logits, deltas = outputs.anchors["rpn"]
    for kind, given in (("rpn", [*logits, *deltas]), ("roi", outputs.predictions[0])):
        ours = torch.autograd.grad(values["kd_kd_loss"], given, retain_graph=True)
        own = sum(value for name, value in values.items() if "kd" not in name)
        theirs = torch.autograd.grad(
            own, given, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        squares = [sum(x.square().sum() for x in side) for side in (ours, theirs)]
        expected = float((squares[0] / squares[1]) ** 0.5)
        assert logged[f"gradient_ratio/{kind}"] == pytest.approx(expected, rel=1e-3)
    assert ("gradient_ratio/p2" in logged) == ("l2" in losses)
    assert logged["gradient_ratio"] > 0
