"""What the command line says when something is wrong: one line, status 1, nothing written."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from ssimkd import ConfigError
from ssimkd.commands import train as train_net
from ssimkd.engine.arguments import argument_parser


def run(tmp_path, config, *args):
    """Runs the entry point with an empty data folder; returns the last line of its complaint."""
    command = [sys.executable, "train_net.py", "--config-file", config, *args]
    env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and not os.listdir(tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last[len("error: ") :]


YAML, LAZY = "configs/ssimkd_R50.yaml", "configs/ssimkd_R50.py"
SHAPES = "configs/shapes/vanilla.yaml"
LAZY_TEST = "dataloader.test.dataset.names"


@pytest.mark.parametrize(
    "config, args, key",
    [
        (YAML, ["--eval-only", "MODEL.DEVICE", "cpu"], "DATASETS.TEST"),
        (YAML, ["DATASETS.TEST", "()"], "DATASETS.TRAIN"),
        (LAZY, ["--eval-only", "train.device=cpu"], LAZY_TEST),
        ("configs/vanilla_R50.py", ["--eval-only", "train.device=cpu"], LAZY_TEST),
        (LAZY, ["train.device=cpu"], LAZY_TEST),
    ],
)
def test_missing_coco(tmp_path, config, args, key):
    said = run(tmp_path, config, *args)
    assert said.startswith(f"{key}: ") and "DETECTRON2_DATASETS" in said
    split = "train2017" if "TRAIN" in key else "val2017"
    for path in (f"coco/annotations/instances_{split}.json", f"coco/{split}"):
        assert str(tmp_path / path) in said


@pytest.mark.parametrize(
    "config, args, expected",
    [
        ("", [], "--config-file is missing"),
        ("no.yaml", [], "no.yaml"),
        ("no.py", [], "no.py"),
        (YAML, ["MODEL.NO_KEY", "1"], "MODEL.NO_KEY"),
        (YAML, ["MODEL.DISTILL.SSIM.WEIGHT", "heavy"], "heavy"),
        (LAZY, ["no key"], "no key"),
        (YAML, ["DATASETS.TEST", "('nowhere',)"], "DATASETS.TEST: no data set 'nowhere'"),
        (SHAPES, ["--num-gpus", "99", "MODEL.DEVICE", "cuda"], "--num-gpus is 99"),
        (SHAPES, ["--num-gpus", "2"], "--num-gpus is 2 and the device is cpu"),
        (SHAPES, ["SOLVER.AMP.ENABLED", "True"], "SOLVER.AMP.ENABLED"),
        (SHAPES, ["--eval-only", "MODEL.WEIGHTS", "no.pth"], "MODEL.WEIGHTS: there is no file"),
        (SHAPES, ["--eval-only"], "MODEL.WEIGHTS is empty: name the checkpoint to evaluate"),
        (LAZY, ["MODEL.WEIGHTS=x.pth"], "MODEL.WEIGHTS: there are the keys"),
        (LAZY, ["MODEL.WEIGHTS", "x.pth"], "MODEL.WEIGHTS: an override of a .py config is written"),
    ],
)
def test_wrong_input(tmp_path, config, args, expected):
    assert expected in run(tmp_path, config, *args)


def test_a_resume_finds_what_the_run_finds(tmp_path, few_shapes, monkeypatch):
    """The check before a run and the run itself go by one rule."""
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)
    words = ["--config-file", SHAPES, "--eval-only", "--resume", "OUTPUT_DIR", str(tmp_path)]
    args = argument_parser().parse_args(words)
    (tmp_path / "last_checkpoint").write_text("")
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is empty"):
        train_net.check(args)
    os.remove(tmp_path / "last_checkpoint")
    (tmp_path / "model_0000001.pth").write_text("")
    assert train_net.check(args) == "cpu"
