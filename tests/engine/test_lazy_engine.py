"""What the LazyConfig driver alone does; what both do is in test_engine.py."""

import threading
from functools import partial

import pytest
import torch
from ssimkd import ConfigError
from ssimkd.checkpoint.export import export_student, parent_of, warn_unless_exportable
from ssimkd.engine.arguments import load_config
from ssimkd.engine.lazy_driver import check_image_format, lazy_evaluate, lazy_model
from ssimkd.engine.limits import check_limits


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.distiller.losses.0.border=wrap", "border must be one of"),
        (
            "model.distiller.losses.0.backend='no'",
            "backend must be one of auto, definition, analytic, cpp, triton, got 'no'",
        ),
        ("+model.distiller.teacher.weight=x", "MODEL.DISTILL.TEACHER: "),
        ("model.distiller.in_features=p2", "MODEL.DISTILL.IN_FEATURES must be a list"),
    ],
)
def test_a_wrong_setting_of_a_lazy_config_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        lazy_model(load_config("configs/ssimkd_R50.py", [override, "train.device=cpu"]))


@pytest.mark.parametrize("split", ["train", "test"])
def test_mapper_and_student_must_agree_on_the_channel_order(split):
    key = f"dataloader.{split}.mapper.image_format"
    cfg = load_config("configs/ssimkd_R50.py", [f"{key}=RGB", "train.device=cpu"])
    with pytest.raises(ConfigError, match=f"{key} is RGB"):
        check_image_format(cfg, lazy_model(cfg), "train", "test")
    if split == "test":
        with pytest.raises(ConfigError, match=f"{key} is RGB"):
            lazy_evaluate(cfg, resume=False)


def test_a_student_that_does_not_say_takes_the_mappers_format():
    cfg = load_config("configs/ssimkd_R50.py", ["train.device=cpu"])
    model = lazy_model(cfg)
    model.input_format = None  # as FCOS
    check_image_format(cfg, model, "test")
    assert model.input_format == "BGR"


def test_mappers_that_disagree_are_both_named():
    test = "dataloader.test.mapper.image_format"
    cfg = load_config("configs/ssimkd_R50.py", [f"{test}=RGB", "train.device=cpu"])
    model = lazy_model(cfg)
    model.input_format = None  # as FCOS
    message = f"{test} is RGB, dataloader.train.mapper.image_format BGR"
    with pytest.raises(ConfigError, match=message):
        check_image_format(cfg, model, "train", "test")


class Locked:
    """A norm that no file can hold."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, channels):
        return torch.nn.Identity()


@pytest.mark.parametrize("norm", [lambda channels: torch.nn.Identity(), Locked()])
def test_a_model_that_yaml_cannot_express_is_said_and_costs_student_yaml_alone(
    norm, tmp_path, caplog
):
    cfg = load_config("configs/vanilla_R50.py", ["train.device=cpu"])
    cfg.model.backbone.norm = partial(torch.nn.GroupNorm, 32)
    warn_unless_exportable(cfg, str(tmp_path))
    assert not caplog.records and not any(tmp_path.iterdir())
    cfg.model.backbone.norm = norm
    check_limits(cfg, eval_only=False)
    (tmp_path / "student.yaml").write_text("of an earlier run")
    warn_unless_exportable(cfg, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["student.yaml"]
    export_student(cfg, lazy_model(cfg).state_dict(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["student.pth"]  # and no draft
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all("YAML cannot express" in message for message in messages)
    assert "student.pth will be written, student.yaml will not: " in messages[0]


def test_a_full_disk_is_not_taken_for_a_model_that_yaml_cannot_express(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("detectron2.config.lazy.yaml.dump", full)
    cfg = load_config("configs/vanilla_R50.py", ["train.device=cpu"])
    with pytest.raises(OSError, match="No space left"):
        warn_unless_exportable(cfg, str(tmp_path))
    assert not any(tmp_path.iterdir())


def build_somehow():
    """In place of a class."""


def test_a_function_that_builds_a_plain_detector_is_its_own_parent():
    assert parent_of(build_somehow) is build_somehow
