"""INHERIT: the student's modules that start from the teacher's weights."""

import pytest
import torch
from conftest import save_teacher, shapes_cfg, zoo_cfg
from detectron2.modeling import build_model
from ssimkd import ConfigError
from ssimkd.engine.preflight import prepare
from ssimkd.teacher.inherit import inherit, tensors_of
from ssimkd.teacher.spec import TeacherSpec

KEY = "MODEL.DISTILL.INHERIT"
CPU = torch.device("cpu")


@pytest.fixture
def spec(teacher_file):
    return TeacherSpec("configs/shapes/teacher.yaml", teacher_file)


def changed(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_named_modules_become_the_teachers_and_no_other(student, spec):
    model = student()
    detector, _, absent = spec.load(CPU)
    assert not absent
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = ["backbone.fpn_output2", "proposal_generator", "roi_heads"]
    inherit(model, detector, modules, absent)
    own, given = model.state_dict(), detector.state_dict()
    for name in own:
        inherited = any(name.startswith(module + ".") for module in modules)
        assert torch.equal(own[name], given[name] if inherited else before[name]), name


def test_the_neck_is_the_backbone_less_its_bottom_up_part(student):
    names = tensors_of(student(), "neck")
    assert {name.split(".")[1].rstrip("2345") for name in names} == {"fpn_lateral", "fpn_output"}


@pytest.mark.parametrize("kind", ["C4", "DC5"])
def test_a_backbone_of_one_map_has_no_neck(kind):
    model = build_model(zoo_cfg(f"COCO-Detection/faster_rcnn_R_50_{kind}_1x.yaml"))
    with pytest.raises(ConfigError, match="no weights in 'neck'; it has backbone, proposal_gen"):
        inherit(model, model, ["neck"], [])


def test_an_equal_pair_inherits_everything(tmp_path):
    """A student of the teacher's own shape then detects as the teacher does."""
    path = save_teacher(shapes_cfg("teacher"), tmp_path / "t.pth", seed=7)
    cfg = shapes_cfg("teacher", "MODEL.META_ARCHITECTURE", "DistillRCNN")
    cfg.MODEL.DISTILL.TEACHER.CONFIG = "configs/shapes/teacher.yaml"
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = path
    cfg.MODEL.DISTILL.IN_FEATURES = ["p2"]
    cfg.MODEL.DISTILL.CHECK_IMAGES = 0
    cfg.MODEL.DISTILL.INHERIT = ["backbone", "proposal_generator", "roi_heads"]
    model = build_model(cfg)
    prepare(model, None, resumed=False)
    expected = torch.load(path)["model"]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_resumed_run_keeps_its_own_weights(student):
    model = student(KEY, ["roi_heads"], "MODEL.DISTILL.CHECK_IMAGES", 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model, None, resumed=True)
    assert not changed(before, model.state_dict())
    prepare(model, None, resumed=False)
    assert changed(before, model.state_dict())


def test_nothing_is_inherited_with_distillation_off(student):
    model = student(KEY, ["roi_heads"], "MODEL.DISTILL.LOSSES", ())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model, None, resumed=False)
    assert not changed(before, model.state_dict())


def test_a_neck_of_other_inputs_does_not_fit(student):
    with pytest.raises(ConfigError, match=f"{KEY}: neck does not fit") as error:
        prepare(student(KEY, ["neck"]), None, resumed=False)
    for level, own, given in ((2, 16, 64), (3, 32, 128), (4, 64, 256), (5, 128, 512)):
        text = f"fpn_lateral{level}.weight is (64, {own}, 1, 1) in the student and (64, {given}, "
        assert text in str(error.value)


def test_what_does_not_fit_is_listed_and_nothing_is_copied(student, spec):
    model = student()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    detector, _, absent = spec.load(CPU)
    with pytest.raises(ConfigError, match=f"{KEY}: backbone.bottom_up does not fit") as error:
        inherit(model, detector, ["roi_heads", "backbone.bottom_up"], absent)
    assert (
        "backbone.bottom_up.res2.0.conv1.weight is (4, 16, 1, 1) in the student and (16, 16, 1, 1) "
        "in the teacher" in str(error.value)
    )
    assert not changed(before, model.state_dict())


def test_unknown_modules_and_missing_weights(student, spec, tmp_path, teacher_file):
    model = student()
    detector, _, absent = spec.load(CPU)
    message = "the student has no weights in 'head'; it has neck, backbone, proposal_generator"
    with pytest.raises(ConfigError, match=message):
        inherit(model, detector, ["head"], absent)
    state = torch.load(teacher_file)["model"]
    del state["roi_heads.box_predictor.cls_score.bias"]
    torch.save({"model": state}, tmp_path / "t.pth")
    spec = TeacherSpec(spec.config, str(tmp_path / "t.pth"))
    detector, _, absent = spec.load(CPU)
    assert absent == ["roi_heads.box_predictor.cls_score.bias"]
    inherit(model, detector, ["roi_heads.box_head"], absent)
    with pytest.raises(ConfigError, match="checkpoint does not hold roi_heads.box_predictor"):
        inherit(model, detector, ["roi_heads"], absent)
