"""DKD against NumPy, and as the two halves of `kd`."""

import numpy as np
import pytest
import torch
from loss_cases import batch_for, make_loss
from numpy_predictions import arrays, kl, softmax
from ssimkd.losses.dkd import decoupled_kl
from ssimkd.losses.predictions import softmax_kl


def test_the_parts_are_those_of_the_formulas():
    student, teacher, context = batch_for("dkd")
    found = make_loss("dkd", temperature=2.0, alpha=3.0)(student, teacher, context)
    labels = student["roi"][0].labels(context.targets).numpy()
    assert len({*labels}) > 1 and 5 in labels  # classes and background
    target, other = [], []
    s, t = (arrays(side["roi"][0])["logits"] / 2 for side in (student, teacher))
    for z_s, z_t, y in zip(s, t, labels):
        p, q = softmax(z_t), softmax(z_s)
        target.append(kl(*(np.array([x[y], 1 - x[y]]) for x in (p, q))))
        other.append(kl(*(softmax(np.delete(z, y)) for z in (z_t, z_s))))
    assert found["target"].item() == pytest.approx(3 * 4 * np.mean(target))
    assert found["other"].item() == pytest.approx(0.25 * 4 * np.mean(other))


def test_the_two_parts_make_up_the_divergence_of_kd():
    student, teacher, context = batch_for("dkd")
    s, t = student["roi"][0].logits, teacher["roi"][0].logits
    labels = student["roi"][0].labels(context.targets)
    target, other = decoupled_kl(s, t, labels)
    share = 1 - t.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(target + share * other, softmax_kl(s, t))


def test_sharp_logits_that_are_equal_cost_nothing():
    logits = 200 * torch.eye(6)
    for labels in (torch.arange(6), torch.arange(6).roll(1)):
        target, other = decoupled_kl(logits, logits, labels)
        assert not target.any() and not other.any()


def test_labels_are_those_of_the_best_overlap_and_background_below_the_threshold():
    student, _, context = batch_for("dkd")
    predictions, labels = student["roi"][0], []
    for boxes, objects in zip(predictions.proposals, context.targets):
        for x0, y0, x1, y1 in boxes.tensor.tolist():
            best, label = 0.2, 5  # the threshold of the matcher in `random_predictions`
            for (a0, b0, a1, b1), y in zip(objects.gt_boxes.tensor.tolist(), objects.gt_classes):
                overlap = max(min(x1, a1) - max(x0, a0), 0) * max(min(y1, b1) - max(y0, b0), 0)
                union = (x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - overlap
                if overlap / union >= best:
                    best, label = overlap / union, int(y)
            labels.append(label)
    assert predictions.labels(context.targets).tolist() == labels
