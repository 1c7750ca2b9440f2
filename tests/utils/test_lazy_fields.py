"""Errors and warnings of a LazyConfig name its own fields."""

import io
import logging

import pytest
from ssimkd import ConfigError
from ssimkd.engine import lazy_driver
from ssimkd.utils.config_files import load_config
from ssimkd.utils.lazy_fields import lazy_fields, naming_lazy_fields


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MODEL.DISTILL.ADAPTER: set it", "model.distiller.adapter: set it"),
        (
            "MODEL.DISTILL.TEACHER.CONFIG or .OPTS: no",
            "model.distiller.teacher.config or .opts: no",
        ),
        ("MODEL.DISTILL.TEACHER.LOSS_WEIGHT is -1", "model.distiller.loss_weight is -1"),
        ("MODEL.DISTILL.INHERIT: neck does not fit", "train.inherit: neck does not fit"),
        ("INHERIT names a module twice", "train.inherit names a module twice"),
        (
            "MODEL.DISTILL.CROSSKD.LAYER is 5",
            "model.distiller.losses, crosskd: layer is 5",
        ),
        ("no set; DATASETS.COCO (.yaml) or datasets.coco (.py)", None),
        (
            "MODEL.DISTILL.TEACHER.OPTS: set INPUT.FORMAT (.yaml) or input_format (.py)",
            "model.distiller.teacher.opts: set INPUT.FORMAT (.yaml) or input_format (.py)",
        ),
        ("MODEL.BACKBONE.NAME of the teacher", None),
        ("MODEL.TIMM.NAME: no such network", "model.backbone.bottom_up.name: no such network"),
        ("MODEL.BACKBONE.FREEZE_AT is 9", "model.backbone.bottom_up.freeze_at is 9"),
        ("there is no file /runs/ADAPTER/x.pth", None),
        ("there is no file C:\\LOSSES\\x.pth", None),
    ],
)
def test_keys_of_a_yaml_as_fields_of_a_lazy_config(text, expected):
    assert lazy_fields(text) == (expected or text)


@pytest.mark.parametrize(("lazy", "key"), [(True, "train.inherit"), (False, "INHERIT")])
def test_a_warning_of_a_lazy_config_names_its_field(lazy, key):
    shown = io.StringIO()
    logger, handler = logging.getLogger("ssimkd"), logging.StreamHandler(shown)
    logger.addHandler(handler)
    try:
        with naming_lazy_fields(lazy):
            with naming_lazy_fields(lazy):
                pass
            logging.getLogger("ssimkd.engine.preflight").warning("%s has no effect", "INHERIT")
        assert not handler.filters
    finally:
        logger.removeHandler(handler)
    assert shown.getvalue() == f"{key} has no effect\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.distiller.adapter=x", "^model.distiller.adapter must be none or conv1x1"),
        ("model.distiller.in_features=[p9]", "^model.distiller.in_features: the student has no"),
        ("model.distiller.losses=[ssim]", r"^model.distiller.losses: an entry is a loss such as L"),
    ],
)
def test_the_error_of_a_lazy_run_names_its_own_field(override, message):
    with pytest.raises(ConfigError, match=message), naming_lazy_fields():
        lazy_driver.build_model(load_config("tests/engine/lazy_shapes.py", [override]))
