"""What a run writes to the terminal, to log.txt and to Weights & Biases."""

import re
import subprocess
import sys
import types

import pytest
from conftest import ROOT
from ssimkd import ConfigError
from ssimkd.engine.writers import wandb_run

QUIET = """
import logging, sys
from detectron2.engine import default_setup, defaults
from detectron2.utils.logger import setup_logger
from ssimkd.engine.writers import quiet_terminal
from omegaconf import OmegaConf
from pycocotools.coco import COCO
defaults.collect_env_info = lambda: ""  # it takes seconds
with quiet_terminal(sys.argv[1], 0):
    default_setup(OmegaConf.create({"train": {"output_dir": sys.argv[1]}}), None)
    setup_logger(sys.argv[1], distributed_rank=0, name="ssimkd")
    COCO().createIndex()  # it prints
    for name in ("ssimkd.preflight", "detectron2.evaluation.testing", "detectron2.utils.events"):
        logging.getLogger(name).info("info of %s", name)
        logging.getLogger(name).warning("warning of %s", name)
"""


def test_a_quiet_terminal_shows_warnings_results_and_progress(tmp_path):
    command = [sys.executable, "-c", QUIET, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = ["ssimkd.preflight", "detectron2.evaluation.testing", "detectron2.utils.events"]
    said = re.findall(r"(?:warning|info) of [\w.]+", done.stdout)
    expected = [f"{kind} of {name}" for name in names for kind in ("info", "warning")]
    shown = set(expected) - {"info of ssimkd.preflight"}
    assert said == [line for line in expected if line in shown]
    assert len(done.stdout.splitlines()) == len(said)  # no environment, no config
    log = (tmp_path / "log.txt").read_text()
    assert "index created!" in log
    assert re.findall(r"(?:warning|info) of [\w.]+", log) == expected
    assert log.count("Environment info") == 1 and "Running with full config" not in done.stdout


class StandIn(types.ModuleType):
    """Has the functions of the package wandb that are called."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.ended = None, 0

    def init(self, **kwargs):
        self.started = kwargs
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.ended += 1


def test_weights_and_biases_follows_tensorboard_in_the_runs_folder(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with wandb_run("detectors", str(tmp_path / "run7")):
        assert wandb.ended == 0
    expected = {"project": "detectors", "name": "run7", "dir": str(tmp_path / "run7")}
    assert wandb.started == {**expected, "sync_tensorboard": True} and wandb.ended == 1


def test_weights_and_biases_is_imported_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it raises ImportError
    with wandb_run("", str(tmp_path)):
        pass
    with (
        pytest.raises(ConfigError, match="MODEL.DISTILL.WANDB_PROJECT: pip install wandb"),
        wandb_run("detectors", str(tmp_path)),
    ):
        pass
