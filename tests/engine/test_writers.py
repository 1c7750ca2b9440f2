"""What a run shows: on a terminal, in log files, to Weights & Biases."""

import io
import logging
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError
from ssimkd.engine.writers import build_writers, wandb_run
from tqdm import tqdm

LOG = logging.getLogger("detectron2.utils.events")


@pytest.fixture(autouse=True)
def no_logger_of_another_test(monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("detectron2"), "handlers", [])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def iterate(writers, start=0, stop=20, period=10):
    """Iterations of a quarter of a second, with the figures of a distilled run."""
    with EventStorage(start) as storage:
        for storage.iter in range(start, stop):
            storage.put_scalars(total_loss=3.0, loss_cls=2.0, ssim_kd_loss_r101=1.0, lr=0.1)
            storage.put_scalar("ssim_kd/p3", 0.5)
            storage.put_scalar("time", 0.25)
            if (storage.iter + 1) % period == 0:
                storage.put_image("seen/detections", np.zeros((3, 4, 5), np.uint8))
                for writer in writers:
                    writer.write()
        storage.iter = stop
        for writer in writers:
            writer.write()
            writer.close()
        return storage


def test_the_printed_line_has_time_to_go_losses_and_rate(tmp_path, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    storage = iterate(build_writers(str(tmp_path), 40, batch_size=8))
    first = caplog.records[0].getMessage()
    assert "eta: 0:00:07 " in first and "iter: 9 " in first  # 30 iterations of 0.25 s
    assert "total_loss: 3 " in first and "ssim_kd_loss_r101: 1 " in first
    assert first.endswith("32.0 images/s")  # 8 in 0.25 s
    assert storage.latest()["images_per_second"] == (32.0, 19)
    assert '"images_per_second": 32.0' in (tmp_path / "metrics.json").read_text()


def test_an_unknown_batch_size_has_no_rate(tmp_path, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    storage = iterate(build_writers(str(tmp_path), 40, batch_size=0))
    assert "images_per_second" not in storage.latest()
    assert not any("images/s" in record.getMessage() for record in caplog.records)


def test_a_terminal_has_a_bar_below_the_lines(tmp_path, monkeypatch, caplog):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = logging.getLogger("detectron2")
    handlers = [logging.StreamHandler(sys.stdout)]
    monkeypatch.setattr(logger, "handlers", handlers)
    caplog.set_level(logging.INFO, LOG.name)
    lines = []
    monkeypatch.setattr(tqdm, "write", lambda line, file: lines.append(line))  # moves the bar
    iterate(build_writers(str(tmp_path), 30, batch_size=8), start=10, stop=30)
    assert logger.handlers is handlers  # given back
    # the line before the bar is made needs no help
    assert ["iter: 29 " in line for line in lines] == [True]
    bars = re.findall(r"\r *\d+%\|.*?\d+/30 .*?\]", terminal.getvalue())
    assert "20/30" in bars[0]  # resumed: it does not start at 0
    assert "30/30" in bars[-1]
    assert "total_loss 3, ssim_kd_loss_r101 1, 32.0 images/s]" in bars[-1]
    assert "loss_cls" not in bars[-1]


def test_no_terminal_no_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    iterate(build_writers(str(tmp_path), 40, batch_size=8))
    assert sys.stderr.getvalue() == ""


QUIET = """
import logging, sys
from detectron2.engine import default_setup, defaults
from detectron2.utils.logger import setup_logger
from ssimkd.engine.writers import quiet_terminal
from omegaconf import OmegaConf
from pycocotools.coco import COCO
defaults.collect_env_info = lambda: ""  # it takes seconds
sys.stderr.isatty = lambda: sys.argv[2] == "tty"
with quiet_terminal(sys.argv[1], 0):
    default_setup(OmegaConf.create({"train": {"output_dir": sys.argv[1]}}), None)
    setup_logger(sys.argv[1], distributed_rank=0, name="ssimkd")
    COCO().createIndex()  # it prints
    for name in ("ssimkd.preflight", "detectron2.evaluation.testing", "detectron2.utils.events"):
        logging.getLogger(name).info("info of %s", name)
        logging.getLogger(name).warning("warning of %s", name)
"""


@pytest.mark.parametrize("where", [pytest.param("tty", marks=pytest.mark.soak), "file"])
def test_quiet_leaves_warnings_results_and_progress(tmp_path, where):
    command = [sys.executable, "-c", QUIET, str(tmp_path), where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = ["ssimkd.preflight", "detectron2.evaluation.testing", "detectron2.utils.events"]
    said = re.findall(r"(?:warning|info) of [\w.]+", done.stdout)
    expected = [f"{kind} of {name}" for name in names for kind in ("info", "warning")]
    shown = set(expected) - {"info of ssimkd.preflight"}
    # beside a bar, the same figures in lines would be too much
    shown -= {"info of detectron2.utils.events"} if where == "tty" else set()
    assert said == [line for line in expected if line in shown]
    assert len(done.stdout.splitlines()) == len(said)  # no environment, no config
    log = (tmp_path / "log.txt").read_text()
    assert "index created!" in log
    assert re.findall(r"(?:warning|info) of [\w.]+", log) == expected
    assert log.count("Environment info") == 1 and "Running with full config" not in done.stdout


class StandIn(types.ModuleType):
    """What is used of the package wandb."""

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
        pytest.raises(ConfigError, match=r"MODEL.DISTILL.WANDB_PROJECT .*: pip install wandb"),
        wandb_run("detectors", str(tmp_path)),
    ):
        pass
