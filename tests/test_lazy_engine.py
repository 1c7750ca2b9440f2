"""What the LazyConfig driver alone does; what both do is in test_engine.py."""

from functools import partial

import pytest
import torch
from ssimkd import ConfigError
from ssimkd.cli import load_config
from ssimkd.export import export_student, parent_of
from ssimkd.lazy_engine import check_image_format, lazy_evaluate, lazy_model
from ssimkd.limits import check_limits


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.distiller.losses.0.border=wrap", "border must be one of"),
        ("model.distiller.losses.0.fast='no'", "fast must be True or False, got 'no'"),
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


def test_a_model_that_yaml_cannot_express_is_refused_before_training(tmp_path):
    opts = ["train.device=cpu", f"train.output_dir={tmp_path}"]
    cfg = load_config("configs/vanilla_R50.py", opts)
    check_limits(cfg, eval_only=False)
    cfg.model.backbone.norm = partial(torch.nn.GroupNorm, 32)
    check_limits(cfg, eval_only=False)
    cfg.model.backbone.norm = lambda channels: torch.nn.Identity()
    check_limits(cfg, eval_only=True)
    with pytest.raises(ConfigError, match="model: .* YAML cannot express"):
        check_limits(cfg, eval_only=False)
    # the tool writes what it can, and leaves no draft behind
    with pytest.raises(ConfigError, match="YAML cannot express"):
        export_student(cfg, lazy_model(cfg).state_dict(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["student.pth"]


def build_somehow():
    """In place of a class."""


def test_a_function_that_builds_a_plain_detector_is_its_own_parent():
    assert parent_of(build_somehow) is build_somehow
