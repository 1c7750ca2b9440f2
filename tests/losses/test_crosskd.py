"""CrossKD against NumPy."""

import numpy as np
import pytest
from loss_cases import STRIDES, batch_for, make_loss
from numpy_predictions import arrays, bce, giou, sigmoid


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_the_parts_are_those_of_the_formulas(exponent):
    student, teacher, context = batch_for("crosskd")
    loss = make_loss("crosskd", exponent=exponent, box=2.0)
    found = loss(student, teacher, context)
    cls = box = 0.0
    for level in STRIDES:
        x, t = arrays(student["cross"][level]), arrays(teacher["dense"][level])
        q, p = sigmoid(x["logits"]), sigmoid(t["logits"])
        cls += (np.abs(p - q) ** exponent * bce(q, p)).sum()
        box += (p.max(-1) * (1 - giou(x["boxes"], t["boxes"]))).sum()
    assert found["cls"].item() == pytest.approx(cls / 3)  # 3 positives in `random_predictions`
    assert found["box"].item() == pytest.approx(2 * box / 3)


def test_an_exponent_below_1_has_no_slope_at_the_teacher_and_is_refused():
    with pytest.raises(ValueError, match="exponent must be at least 1"):
        make_loss("crosskd", exponent=0.5)
