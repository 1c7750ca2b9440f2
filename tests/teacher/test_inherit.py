"""INHERIT: modules of the student that start from the teacher's weights."""

import pytest
import torch
from conftest import zoo_cfg
from detectron2.modeling import build_model
from ssimkd import ConfigError
from ssimkd.teacher.inherit import inherit, tensors_of
from ssimkd.teacher.spec import TeacherSpec

KEY = "MODEL.DISTILL.INHERIT"
CONFIG = "configs/shapes/teacher.yaml"
CPU = torch.device("cpu")


@pytest.fixture
def teacher(teacher_file):
    detector, _, missing = TeacherSpec(CONFIG, teacher_file).load(CPU)
    assert not missing
    return detector


def test_named_modules_become_the_teachers_and_no_other(student, teacher):
    model = student()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = ["backbone.fpn_output2", "proposal_generator", "roi_heads"]
    names = inherit(model, teacher, modules, [])
    own, given = model.state_dict(), teacher.state_dict()
    for name in own:
        inherited = any(name.startswith(module + ".") for module in modules)
        assert (name in names) == inherited
        assert torch.equal(own[name], given[name] if inherited else before[name]), name


def test_the_neck_is_the_backbone_without_its_bottom_up_part(student):
    names = tensors_of(student(), "neck")
    assert {name.split(".")[1].rstrip("2345") for name in names} == {"fpn_lateral", "fpn_output"}


@pytest.mark.parametrize("kind", ["C4", "DC5"])
def test_a_backbone_of_one_map_has_no_neck(kind):
    model = build_model(zoo_cfg(f"COCO-Detection/faster_rcnn_R_50_{kind}_1x.yaml"))
    with pytest.raises(ConfigError, match="no weights in 'neck'; it has backbone, proposal_gen"):
        inherit(model, model, ["neck"], [])


def test_what_does_not_fit_is_listed_and_nothing_is_copied(student, teacher):
    model = student()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=f"{KEY}: neck does not fit") as error:
        inherit(model, teacher, ["roi_heads", "neck"], [])
    for level, own, given in ((2, 16, 64), (3, 32, 128), (4, 64, 256), (5, 128, 512)):
        text = f"fpn_lateral{level}.weight is (64, {own}, 1, 1) in the student and (64, {given}, "
        assert text in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unknown_module_is_named(student, teacher):
    message = "the student has no weights in 'head'; it has neck, backbone, proposal_generator"
    with pytest.raises(ConfigError, match=message):
        inherit(student(), teacher, ["head"], [])


def test_tensors_that_the_checkpoint_lacks_are_not_inherited(student, tmp_path, teacher_file):
    state = torch.load(teacher_file)["model"]
    del state["roi_heads.box_predictor.cls_score.bias"]
    torch.save({"model": state}, tmp_path / "t.pth")
    detector, _, missing = TeacherSpec(CONFIG, str(tmp_path / "t.pth")).load(CPU)
    assert missing == ["roi_heads.box_predictor.cls_score.bias"]
    inherit(student(), detector, ["roi_heads.box_head"], missing)
    with pytest.raises(ConfigError, match="checkpoint does not hold roi_heads.box_predictor"):
        inherit(student(), detector, ["roi_heads"], missing)
