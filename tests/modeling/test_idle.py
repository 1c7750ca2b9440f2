"""Settings with which a student learns nothing from its teacher are found before the training."""

import pytest
import torch
from conftest import image_batch
from ssimkd.modeling.idle import idle_by_gradient, idle_by_settings

BATCH = image_batch((96, 96), (64, 96), boxes=2)
KEY = "MODEL.DISTILL"


def gradients(student, loss, *opts, batch=BATCH, iterations=900):
    model = student(f"{KEY}.LOSSES", (loss,), *opts)
    model.distiller.build_teacher(torch.device("cpu"))
    return idle_by_gradient(model, model.distiller, batch, iterations)


def zeros(loss, *options):
    return [x for option in options for x in (f"{KEY}.{loss.upper()}.{option}", 0.0)]


@pytest.mark.parametrize(
    ("opts", "reason"),
    [
        ((f"{KEY}.SSIM.WEIGHT", 0.0), f"{KEY}.SSIM.WEIGHT is 0"),
        ((f"{KEY}.TEACHER.LOSS_WEIGHT", 0.0), f"{KEY}.TEACHER.LOSS_WEIGHT is 0"),
        ((f"{KEY}.LEVEL_WEIGHTS", [0.0] * 4), f"all of {KEY}.LEVEL_WEIGHTS are 0"),
        ((f"{KEY}.LEVEL_WEIGHTS", [0.0, 0.0, 1.0, 0.0]), None),
    ],
)
def test_weights_of_0(student, opts, reason):
    assert idle_by_settings(student(*opts).distiller).get("ssim") == reason


@pytest.mark.parametrize(
    ("loss", "opts"),
    [
        ("ssim", (f"{KEY}.SSIM.EXPONENTS", (0.0, 0.0, 0.0))),
        ("fgd", zeros("fgd", "FOREGROUND", "BACKGROUND", "ATTENTION", "RELATION")),
        ("fkd", zeros("fkd", "FEATURE", "CHANNEL", "SPATIAL", "NON_LOCAL")),
        ("mgd", zeros("mgd", "GENERATION")),
        ("defeat", zeros("defeat", "FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT")),
        ("dkd", zeros("dkd", "ALPHA", "BETA")),
        ("dist", zeros("dist", "BETA", "GAMMA")),
    ],
)
def test_options_that_leave_no_gradient(student, loss, opts):
    assert gradients(student, loss, *opts) == {
        loss: f"its options in {KEY}.{loss.upper()} leave no gradient"
    }
    assert gradients(student, loss) == {}  # with the default options


@pytest.mark.parametrize(
    ("opts", "iterations", "late"),
    [
        ((), 900, True),  # DETACH_ITERS is 1000
        ((), 1001, False),
        ((f"{KEY}.STOP_ITER", 1000), 9000, True),
        ((f"{KEY}.ICD.DETACH_ITERS", 10, f"{KEY}.STOP_ITER", 20), 900, False),
    ],
)
def test_a_loss_that_begins_after_the_end(student, opts, iterations, late):
    opts = (f"{KEY}.ICD.DETACH_ITERS", 1000, *opts)
    found = gradients(student, "icd", *opts, iterations=iterations)
    assert ("icd" in found) == late
    assert not late or f"see {KEY}.ICD.DETACH_ITERS" in found["icd"]


def test_a_batch_without_objects_says_nothing_about_a_loss_of_objects(student):
    assert gradients(student, "icd", batch=image_batch((96, 96), boxes=0)) == {}
