"""What the command line says when something is wrong: one line, status 1, nothing written."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


def run(tmp_path, *args):
    env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    command = [sys.executable, "train_net.py", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


YAML, LAZY = "configs/ssimkd_R50.yaml", "configs/ssimkd_R50.py"
SHAPES = "configs/shapes/vanilla.yaml"


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--config-file", YAML, "--eval-only", "MODEL.DEVICE", "cpu"], "DATASETS.TEST"),
        (
            ["--config-file", LAZY, "--eval-only", "train.device=cpu"],
            "dataloader.test.dataset.names",
        ),
        (["--config-file", YAML, "DATASETS.TEST", "()"], "DATASETS.TRAIN"),
    ],
)
def test_missing_coco(tmp_path, args, expected):
    done = run(tmp_path, *args, *([] if "py" in args[1] else ["OUTPUT_DIR", str(tmp_path / "out")]))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {expected}: ") and "DETECTRON2_DATASETS" in last
    split = "train2017" if "TRAIN" in expected else "val2017"
    for path in (f"coco/annotations/instances_{split}.json", f"coco/{split}"):
        assert str(tmp_path / path) in last
    assert "Traceback" not in done.stderr and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], "--config-file is missing"),
        (["--config-file", "no.yaml"], "no.yaml"),
        (["--config-file", "no.py"], "no.py"),
        (["--config-file", YAML, "MODEL.NO_KEY", "1"], "MODEL.NO_KEY"),
        (["--config-file", YAML, "MODEL.DISTILL.SSIM.WEIGHT", "heavy"], "heavy"),
        (["--config-file", LAZY, "no key"], "no key"),
        (["--config-file", YAML, "DATASETS.TEST", "('nowhere',)"], "'nowhere'"),
        (
            [
                "--config-file",
                SHAPES,
                "--num-gpus",
                "99",
                "MODEL.DEVICE",
                "cuda",
            ],
            "--num-gpus is 99",
        ),
        (
            ["--config-file", "configs/shapes/vanilla.yaml", "SOLVER.AMP.ENABLED", "True"],
            "SOLVER.AMP",
        ),
    ],
)
def test_wrong_input(tmp_path, args, expected):
    done = run(tmp_path, *args)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and expected in last
    assert "Traceback" not in done.stderr and not os.listdir(tmp_path)
