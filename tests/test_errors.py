"""A user's error is one line, a bug is a traceback, and log.txt has the traceback of both."""

import io
import logging
import types
from contextlib import redirect_stdout
from functools import partial

import pytest
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.utils.logger import _cached_log_stream
from omegaconf import OmegaConf
from ssimkd import ConfigError
from ssimkd.engine import lazy_driver
from ssimkd.errors import (
    as_setting_error,
    exit_in_one_line,
    lazy_fields,
    log_files,
    naming_lazy_fields,
    traceback_in_log,
)
from ssimkd.losses import SSIMLoss
from ssimkd.modeling.backbones import TorchvisionBackbone
from ssimkd.utils.config_files import load_config


@pytest.fixture
def log(tmp_path, monkeypatch):
    """log.txt, as Detectron2's setup_logger opens it."""
    path = tmp_path / "log.txt"
    handler = logging.StreamHandler(_cached_log_stream(str(path)))
    monkeypatch.setattr(logging.getLogger("detectron2"), "handlers", [handler])
    return path


def users_module(source):
    """A module of the user's own, made from source code."""
    module = types.ModuleType("users_own")
    exec(source, vars(module))
    return module


def config(architecture):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = architecture
    return cfg


SETTINGS = {
    "unknown name": partial(build_model, config("NoSuchThing")),
    "unknown argument": partial(instantiate, LazyCall(TorchvisionBackbone)(heft=1)),
}


@pytest.mark.parametrize("build", SETTINGS.values(), ids=SETTINGS)
def test_what_detectron2_raises_for_a_setting_names_the_key_and_the_log(build, log):
    with (
        pytest.raises(ConfigError, match="^MODEL: ") as error,
        traceback_in_log(),
        as_setting_error("MODEL"),
    ):
        build()
    assert "\n" not in str(error.value) and f"(traceback in {log})" in str(error.value)
    assert log.read_text().count("Traceback (most recent call last)") == 1


def test_the_log_is_found_while_it_takes_the_standard_output(log):
    """`--quiet` redirects the standard output to log.txt."""
    (handler,) = log_files("detectron2")
    with redirect_stdout(handler.stream):
        assert list(log_files("detectron2")) == [handler]


def test_a_wrong_option_of_this_package_needs_no_traceback(log):
    with pytest.raises(ConfigError, match="weight must be") as error, as_setting_error("model"):
        instantiate(LazyCall(SSIMLoss)(weight=-1.0))
    assert "traceback" not in str(error.value)


def test_a_bug_in_the_users_own_code_goes_on_as_it_is(log):
    own = users_module("def build(): return {}['no key']")
    with pytest.raises(KeyError, match="no key"), traceback_in_log(), as_setting_error("MODEL"):
        instantiate(LazyCall(own.build)())
    assert log.read_text().count("Traceback") == 1 and "KeyError" in log.read_text()


def test_a_bug_of_this_package_goes_on_as_it_is(monkeypatch):
    own = users_module("def forward(): return 1 / 0")
    monkeypatch.setitem(own.forward.__globals__, "__name__", "ssimkd.modeling.distiller")
    with pytest.raises(ZeroDivisionError), as_setting_error("MODEL"):
        own.forward()


def open_nothing():
    open("no/such/file")


def missing_key():
    OmegaConf.create({"a": 1}, flags={"struct": True}).train  # noqa: B018


@pytest.mark.parametrize(
    "action, expected",
    [
        (open_nothing, "FileNotFoundError: .*no/such/file"),
        (missing_key, "train: ConfigAttributeError"),
    ],
)
def test_a_file_or_key_that_is_not_there_is_one_line(action, expected):
    with pytest.raises(SystemExit, match=f"^error: {expected}") as end, exit_in_one_line():
        action()
    assert "\n" not in end.value.code


@pytest.mark.parametrize("error", [OSError("no file is named"), KeyError("a"), RuntimeError("b")])
def test_any_other_error_is_a_traceback(error):
    with pytest.raises(type(error)), exit_in_one_line():
        raise error


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
    with pytest.raises(ConfigError, match=message):
        lazy_driver.build_model(load_config("tests/engine/lazy_shapes.py", [override]))
