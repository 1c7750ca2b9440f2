"""DIST against NumPy, and what a correlation does not see."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from loss_cases import batch_for, make_loss
from numpy_predictions import arrays, sigmoid, softmax
from ssimkd.losses.dist import correlation_cost


def test_the_parts_are_those_of_the_formulas():
    student, teacher, context = batch_for("dist")
    found = make_loss("dist", beta=2.0)(student, teacher, context)
    tables = {"roi": [], "dense": []}
    tables["roi"].append([softmax(arrays(x["roi"][0])["logits"]) for x in (student, teacher)])
    for level in student["dense"]:
        logits = (arrays(x["dense"][level])["logits"] for x in (student, teacher))
        tables["dense"].append([sigmoid(z).reshape(len(z), -1) for z in logits])
    for kind, pairs in tables.items():
        inter = sum(np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t)]) for s, t in pairs)
        intra = sum(
            np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T)]) for s, t in pairs
        )
        assert found[f"{kind}_inter"].item() == pytest.approx(2 * inter)
        assert found[f"{kind}_intra"].item() == pytest.approx(intra)


def test_offset_and_positive_factor_of_a_row_or_column_do_not_matter():
    s, t = torch.rand(2, 7, 5, dtype=torch.float64)
    for dim, shape in ((1, (7, 1)), (0, (1, 5))):
        factor, offset = 0.1 + torch.rand(2, *shape, dtype=torch.float64)
        moved = correlation_cost(s * factor + offset, t, dim)
        torch.testing.assert_close(moved, correlation_cost(s, t, dim))


def test_probabilities_that_vanish_cost_nothing_where_they_are_equal():
    table = torch.rand(50, 3) * torch.tensor([1.0, 1e-12, 0.0])
    for dim in (0, 1):
        assert not correlation_cost(table, table, dim).any()
    constant = torch.full((50, 3), 0.1)
    cost = correlation_cost(table[:, :1], constant[:, :1], 0)
    torch.testing.assert_close(cost, torch.tensor([0.5]))


@pytest.mark.parametrize("exponent", [-15, -22, -30, -38])
def test_probabilities_that_vanish_cost_at_most_what_opposite_ones_cost(exponent):
    s, t = torch.rand(2, 7, 5)
    s = (s * 10.0**exponent).requires_grad_()  # squares below 1e-45 are 0
    for dim in (0, 1):
        cost = correlation_cost(s, t, dim)
        (slope,) = torch.autograd.grad(cost.sum(), s)
        assert (cost >= 0).all() and (cost <= 2 + 1e-5).all() and torch.isfinite(slope).all()


def test_a_constant_in_a_row_of_logits_of_a_box_head_does_not_matter():
    student, teacher, context = batch_for("dist")
    moved = [replace(x, logits=x.logits + 3.0) for x in student["roi"]]
    found = make_loss("dist")({**student, "roi": moved}, teacher, context)
    torch.testing.assert_close(found, make_loss("dist")(student, teacher, context))
