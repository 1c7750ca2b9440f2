"""BCKD against NumPy, and where it is a loss that is known."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from loss_cases import STRIDES, batch_for, make_loss
from numpy_predictions import arrays, bce, giou, sigmoid


def test_the_parts_are_those_of_the_formulas():
    student, teacher, context = batch_for("bckd")
    found = make_loss("bckd")(student, teacher, context)
    cls = box = 0.0
    for level in STRIDES:
        s, t = (arrays(side["dense"][level]) for side in (student, teacher))
        q, p = (sigmoid(x["logits"]) for x in (s, t))
        cls += (abs(p - q) * bce(q, p)).sum()
        box += (abs(p - q).max(-1) * (1 - giou(s["boxes"], t["boxes"]))).sum()
    assert found["cls"].item() == pytest.approx(cls / 3)  # 3 positives in `random_predictions`
    assert found["box"].item() == pytest.approx(4 * box / 3)


def test_a_teacher_that_is_certain_gives_a_cross_entropy_weighted_by_the_error():
    student, teacher, context = batch_for("bckd")
    expected = 0
    for level, predictions in teacher["dense"].items():
        certain = (predictions.logits > 1).double()
        teacher["dense"][level] = replace(predictions, logits=240 * certain - 120)
        z = student["dense"][level].logits
        errors = (certain - z.sigmoid()).abs()
        expected += (
            errors * F.binary_cross_entropy_with_logits(z, certain, reduction="none")
        ).sum()
    found = make_loss("bckd")(student, teacher, context)["cls"]
    torch.testing.assert_close(found, expected / 3)


def test_near_the_teacher_the_slope_is_that_of_its_entropy():
    _, teacher, context = batch_for("bckd")
    teacher = {"dense": {"p3": teacher["dense"]["p3"]}}
    logits = (teacher["dense"]["p3"].logits + 1e-7).requires_grad_()
    student = {"dense": {"p3": replace(teacher["dense"]["p3"], logits=logits)}}
    make_loss("bckd")(student, teacher, context)["cls"].backward()
    p = logits.detach().sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(logits.grad, entropy * p * (1 - p) / 3, rtol=1e-4, atol=1e-9)
