"""A user's error is one line, a bug is a traceback, and log.txt has the traceback of both."""

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
from ssimkd.errors import as_setting_error, exit_in_one_line, traceback_in_log
from ssimkd.losses import SSIMLoss
from ssimkd.modeling.backbones import TorchvisionBackbone
from ssimkd.utils.log_files import log_files


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
