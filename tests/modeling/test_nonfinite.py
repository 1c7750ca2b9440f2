"""NaN in a map of student or teacher: what is said about it, and that nothing else changes."""

import copy
import math

import pytest
import torch
from conftest import image_batch
from detectron2.utils.events import EventStorage
from ssimkd.modeling.nonfinite import explain_nonfinite

BATCH = image_batch((96, 96), (96, 128))


def spoil(backbone):
    """Puts one NaN into the backbone's p3."""

    def replace(module, args, output):
        output = output.clone()
        output[0, 0, 0, 0] = math.nan
        return output

    backbone.fpn_output3.register_forward_hook(replace)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_the_loss_the_level_and_the_map_are_named(student, whose):
    model = student()
    model.distiller.build_teacher(model.device)
    spoil(model.backbone if whose == "student" else model.distiller.teacher.model.backbone)
    text = explain_nonfinite(model, BATCH)
    assert text == f"ssim_kd/p3 is nan, because the {whose}'s p3 holds NaN or infinity"


def test_both_sides_are_named(student):
    model = student()
    model.distiller.build_teacher(model.device)
    spoil(model.backbone)
    spoil(model.distiller.teacher.model.backbone)
    whose = "the student's and the teacher's"
    assert explain_nonfinite(model, BATCH) == (
        f"ssim_kd/p3 is nan, because {whose} p3 holds NaN or infinity"
    )


def test_a_part_that_depends_on_all_levels_names_the_spoilt_one(student):
    model = student("MODEL.DISTILL.LOSSES", ("icd",))
    model.distiller.build_teacher(model.device)
    spoil(model.distiller.teacher.model.backbone)
    texts = explain_nonfinite(model, BATCH).split("; ")
    assert len(texts) > 1
    assert all(text.endswith("because the teacher's p3 holds NaN or infinity") for text in texts)


def test_the_head_is_named_whose_predictions_are_not_finite(student):
    model = student("MODEL.DISTILL.LOSSES", ("dist",))
    model.distiller.build_teacher(model.device)
    with torch.no_grad():
        model.distiller.teacher.model.roi_heads.box_predictor.cls_score.bias.fill_(math.nan)
    text = explain_nonfinite(model, BATCH)
    assert "dist_kd/roi_inter is nan, because the teacher's roi head holds NaN or infinity" in text


def test_the_distiller_itself_returns_nan(student):
    model = student()
    model.distiller.build_teacher(model.device)
    spoil(model.distiller.teacher.model.backbone)
    with EventStorage(0) as storage:
        assert model(BATCH)["ssim_kd_loss"].isnan()
    assert "ssim_kd/p2" in storage.latest() and "ssim_kd/p3" not in storage.latest()


def test_nothing_is_said_and_nothing_changes_if_all_is_finite(student):
    model = student("MODEL.DISTILL.LOSSES", ("ssim", "mgd", "icd"))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert explain_nonfinite(model, BATCH) == ""
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
