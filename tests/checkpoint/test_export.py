"""student.pth and student.yaml are the plain detector's, whichever the config."""

from functools import partial

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from ssimkd import ConfigError, DistillMixin, DistillRCNN
from ssimkd.checkpoint.export import build_detector, export_student, warn_unless_exportable
from ssimkd.engine import yaml_driver
from ssimkd.evaluation.predictor import load_detector
from ssimkd.utils.config_files import load_config
from ssimkd.utils.config_keys import for_inference


def assert_equal(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_stock_detectron2_reads_the_student_of_a_yaml_config(student, tmp_path):
    model = student("MODEL.DISTILL.ADAPTER", "conv1x1")
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("distiller.")}
    assert len(weights) < len(model.state_dict())
    distilled = load_config("configs/shapes/ssimkd.yaml", ["OUTPUT_DIR", "/home/me/run"])
    export_student(distilled, model.state_dict(), str(tmp_path))
    cfg = get_cfg()  # without this project's keys
    cfg.merge_from_file(str(tmp_path / "student.yaml"))
    found = build_model(cfg)
    assert type(found).__name__ == "GeneralizedRCNN"
    assert cfg.OUTPUT_DIR == "./output"  # the export can be moved
    DetectionCheckpointer(found).load(str(tmp_path / cfg.MODEL.WEIGHTS))
    assert_equal(found, weights)


@pytest.fixture
def lazy():
    cfg = load_config("vanilla_R50.py")
    cfg.model.backbone.norm = partial(torch.nn.GroupNorm, 32)
    return cfg


def test_stock_detectron2_reads_the_student_of_a_lazy_config(lazy, tmp_path, caplog):
    weights = instantiate(lazy.model).state_dict()
    export_student(lazy, weights, str(tmp_path))
    cfg = LazyConfig.load(str(tmp_path / "student.yaml"))
    assert cfg.model._target_ == "detectron2.modeling.GeneralizedRCNN"
    found = instantiate(cfg.model)
    DetectionCheckpointer(found).load(str(tmp_path / cfg.train.init_checkpoint))
    assert_equal(found, weights)


def test_a_model_that_yaml_cannot_express_has_no_student_yaml(lazy, tmp_path, caplog):
    warn_unless_exportable(lazy)
    assert not caplog.records
    lazy.model.backbone.norm = lambda channels: torch.nn.Identity()
    (tmp_path / "student.yaml").write_text("of an earlier run")
    warn_unless_exportable(lazy)
    export_student(lazy, instantiate(lazy.model).state_dict(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["student.pth"]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all("YAML cannot express" in message for message in messages)
    assert "student.pth will be written, student.yaml will not: " in messages[0]


@pytest.fixture
def own_student():
    """A student with a method of its own, and one whose detector is not registered."""

    class OwnStudent(DistillRCNN):
        def preprocess_image(self, batched_inputs):
            return super().preprocess_image(batched_inputs)

    class OwnDetector(GeneralizedRCNN):
        pass

    class OtherStudent(DistillMixin, OwnDetector):
        pass

    for one in (OwnStudent, OtherStudent):
        META_ARCH_REGISTRY.register(one)
    yield OwnStudent
    for one in (OwnStudent, OtherStudent):
        META_ARCH_REGISTRY._obj_map.pop(one.__name__)


def test_methods_of_the_users_own_detect_but_are_not_exported(own_student, tmp_path, caplog):
    cfg = load_config("configs/shapes/ssimkd.yaml", ["MODEL.META_ARCHITECTURE", "OwnStudent"])
    path, _ = export_student(cfg, build_detector(for_inference(cfg)).state_dict(), str(tmp_path))
    assert "lacks these methods of OwnStudent" in caplog.text
    assert caplog.text.count("preprocess_image") == 1
    assert type(load_detector(cfg, path)) is own_student


def test_a_detector_that_is_not_registered_is_refused_before_the_training(own_student):
    cfg = load_config("configs/shapes/ssimkd.yaml", ["MODEL.META_ARCHITECTURE", "OtherStudent"])
    with pytest.raises(ConfigError, match="OwnDetector is not registered, .* above class OwnDet"):
        yaml_driver.train(cfg, False)


def test_weights_of_another_model_are_an_error_and_leave_what_is_there(student, tmp_path):
    (tmp_path / "student.pth").write_text("of an earlier run")
    state = student().state_dict()
    state.pop("backbone.fpn_lateral2.weight")
    with pytest.raises(ConfigError, match="1 tensors are missing.* backbone.fpn_lateral2.weight"):
        export_student(load_config("configs/shapes/ssimkd.yaml"), state, str(tmp_path))
    assert (tmp_path / "student.pth").read_text() == "of an earlier run"
