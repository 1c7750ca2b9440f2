"""Soft targets against NumPy, and where they are losses that are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_cases import COUNTS, SIZES, batch_for, make_loss, random_predictions
from numpy_predictions import arrays, binary_kl, giou, kl, sigmoid, softmax

T = 2.0


def parts_of(student, teacher, **options):
    _, _, context = batch_for("kd")
    return make_loss("kd", **options)(student, teacher, context)


def box_head(**changes):
    """Student and teacher with only a box head; `changes` are of the teacher's predictions."""
    (student,), (teacher,) = (random_predictions(seed)["roi"] for seed in (0, 1))
    return {"roi": [student]}, {"roi": [replace(teacher, **changes)]}


def test_the_parts_are_those_of_the_formulas():
    student, teacher, context = batch_for("kd", SIZES, COUNTS)
    found = make_loss("kd", temperature=T, roi_box=3.0)(student, teacher, context)
    expected = dict.fromkeys(found, 0.0)
    (s, t) = (arrays(side["roi"][0]) for side in (student, teacher))
    p = softmax(t["logits"])
    expected["roi_cls"] = T**2 * kl(softmax(t["logits"] / T), softmax(s["logits"] / T)).mean()
    classes, rows = t["logits"][:, :-1].argmax(1), np.arange(len(p))
    distance = np.abs(s["deltas"][rows, classes] - t["deltas"][rows, classes]).sum(1)
    expected["roi_box"] = 3 * ((1 - p[:, -1]) * distance).mean()
    objects = 0.0
    for kind in ("rpn", "dense"):
        for level in student[kind]:
            s, t = (arrays(side[kind][level]) for side in (student, teacher))
            w = sigmoid(t["logits"]).max(-1)
            p, q = (sigmoid(x["logits"] / T) for x in (t, s))
            expected[f"{kind}_cls"] += T**2 * binary_kl(p, q).sum()
            if kind == "rpn":
                objects += w.sum()
                expected["rpn_box"] += (w[..., None] * np.abs(s["deltas"] - t["deltas"])).sum()
            else:
                expected["dense_box"] += (w * (1 - giou(s["boxes"], t["boxes"]))).sum()
                p, q = (sigmoid(x["centerness"] / T) for x in (t, s))
                expected["centerness"] += T**2 * (w * binary_kl(p, q)).sum()
    divisors = {"rpn_cls": objects, "rpn_box": objects, "roi_cls": 1, "roi_box": 1}
    for part, value in found.items():
        assert value.item() == pytest.approx(expected[part] / divisors.get(part, 3.0), rel=1e-9)


def test_a_teacher_that_is_certain_gives_the_detectors_own_loss_of_classes():
    student, _ = box_head()
    labels = torch.arange(12) % 6
    student, teacher = box_head(logits=120.0 * F.one_hot(labels, 6).double())
    own = F.cross_entropy(student["roi"][0].logits, labels)
    torch.testing.assert_close(parts_of(student, teacher)["roi_cls"], own)


def test_a_high_temperature_compares_centred_logits():
    student, teacher = box_head()
    found = parts_of(student, teacher, temperature=1e4)["roi_cls"]
    apart = student["roi"][0].logits - teacher["roi"][0].logits
    apart = apart - apart.mean(1, keepdim=True)
    expected = apart.square().sum(1).mean() / (2 * 6)  # the first term of the series in 1 / T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_a_constant_in_a_row_of_logits_and_the_order_of_proposals_do_not_matter():
    student, teacher = box_head()
    expected = parts_of(student, teacher)
    order = torch.randperm(12)
    moved = [
        {"roi": [replace(x, logits=x.logits[order] + 3.0, deltas=x.deltas[order])]}
        for x in (student["roi"][0], teacher["roi"][0])
    ]
    torch.testing.assert_close(parts_of(*moved), expected)


def test_boxes_of_equal_blocks_cost_what_one_class_agnostic_box_costs():
    sides = [side["roi"][0] for side in box_head()]
    agnostic = [{"roi": [replace(x, deltas=x.deltas[:, :1])]} for x in sides]
    blocks = [{"roi": [replace(x, deltas=x.deltas[:, :1].expand(-1, 5, 4))]} for x in sides]
    torch.testing.assert_close(parts_of(*blocks), parts_of(*agnostic))


def test_a_head_whose_factors_are_0_is_not_compared():
    options = dict(rpn_cls=0, rpn_box=0, dense_cls=0, dense_box=0, centerness=0)
    loss = make_loss("kd", **options)
    assert loss.compares == ("roi", "roi_box")
    assert make_loss("kd", roi_box=0, **options).compares == ("roi",)
    student, teacher, context = batch_for("kd")
    assert set(loss(student, teacher, context)) == {"roi_cls", "roi_box"}


def test_each_stage_of_a_box_head_has_its_parts():
    student, teacher = box_head()
    expected = parts_of(student, teacher)
    both = [{"roi": side["roi"] * 2} for side in (student, teacher)]
    found = parts_of(*both)
    assert set(found) == {f"{part}_stage{k}" for part in expected for k in range(2)}
    torch.testing.assert_close(found["roi_box_stage1"], expected["roi_box"])


def test_gradients_are_the_derivatives():
    student, teacher, context = batch_for("kd", SIZES[:1], COUNTS[:1], (2,))
    loss = make_loss("kd", temperature=T)

    def total(logits, deltas):
        predictions = replace(student["roi"][0], logits=logits, deltas=deltas)
        return sum(loss({"roi": [predictions]}, teacher, context).values())

    assert torch.autograd.gradcheck(total, (student["roi"][0].logits, student["roi"][0].deltas))
