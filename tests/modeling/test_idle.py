"""Settings with which a student learns nothing from its teacher are found before the training."""

import pytest
from conftest import shapes_cfg
from detectron2.modeling import build_model
from ssimkd import ConfigError
from ssimkd.modeling.idle import idle_losses

KEY = "MODEL.DISTILL"
FACTORS = {
    "bckd": ("CLS", "BOX"),
    "crosskd": ("CLS", "BOX"),
    "defeat": ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT"),
    "dist": ("BETA", "GAMMA"),
    "dkd": ("ALPHA", "BETA"),
    "fgd": ("FOREGROUND", "BACKGROUND", "ATTENTION", "RELATION"),
    "fkd": ("FEATURE", "CHANNEL", "SPATIAL", "NON_LOCAL"),
    "kd": ("RPN_CLS", "RPN_BOX", "ROI_CLS", "ROI_BOX", "DENSE_CLS", "DENSE_BOX"),
    "mgd": ("GENERATION",),
}


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
    assert idle_losses(student(*opts).distiller, 900).get("ssim") == reason


@pytest.mark.parametrize(("loss", "options"), FACTORS.items())
def test_factors_that_are_all_0_are_an_error(loss, options):
    zeros = [x for option in options for x in (f"{KEY}.{loss.upper()}.{option}", 0.0)]
    with pytest.raises(ConfigError, match=f"{KEY}.{loss.upper()}.*0"):
        build_model(shapes_cfg("ssimkd", *zeros))


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
    opts = (f"{KEY}.LOSSES", ("icd",), f"{KEY}.ICD.DETACH_ITERS", 1000, *opts)
    reason = f"{KEY}.ICD.DETACH_ITERS is 1000, beyond the last step" if late else None
    assert idle_losses(student(*opts).distiller, iterations).get("icd") == reason
