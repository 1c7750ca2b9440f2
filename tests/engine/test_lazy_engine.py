"""What the LazyConfig driver alone does; what both do is in test_engine.py."""

import pytest
from ssimkd import ConfigError
from ssimkd.engine.arguments import load_config
from ssimkd.engine.lazy_driver import check_image_format, lazy_evaluate, lazy_model


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.distiller.losses.0.border=wrap", "border must be one of"),
        (
            "model.distiller.losses.0.backend='no'",
            "backend must be one of auto, definition, .* got 'no'",
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
