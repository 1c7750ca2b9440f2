"""train_net.py in the processes of torchrun trains and resumes as one process does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_processes import NOTHING_DRAWN, assert_same

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
YAML = [
    "--config-file", "configs/shapes/ssimkd.yaml", "MODEL.RESNETS.NORM", "FrozenBN", *NOTHING_DRAWN,
    "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2,
    "INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", "[64,64]",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.ASPECT_RATIO_GROUPING", False,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 5,
    "DATASETS.UNLABELED", "('ssimkd_shapes_train[50%:]',)", "SOLVER.IMS_PER_BATCH_UNLABELED", 2,
    # after the third iteration the adapters must still get a gradient in every process
    "MODEL.DISTILL.ADAPTER", "conv1x1", "MODEL.DISTILL.STOP_ITER", 3,
]  # fmt: skip


def begin(command, *args, **env):
    """Starts the entry point as a user does."""
    command = [*map(str, command), "train_net.py", *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, **pipes)


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out[-3000:] + err[-3000:]
    return out, err


def final(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def metrics(folder):
    """Losses, which are averaged over processes, and the results of the evaluation."""
    lines = (folder / "metrics.json").read_text().splitlines()
    logged = {k: v for line in lines for k, v in json.loads(line).items()}
    return {k: v for k, v in logged.items() if "loss" in k or k.startswith("bbox/AP")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, few_images):
    """Four iterations of four images in one process."""
    folder = tmp_path_factory.mktemp("alone")
    finish(begin([sys.executable], *YAML, "OUTPUT_DIR", folder))
    return folder


def test_torchrun_trains_on_the_same_images_to_the_same_weights(alone, tmp_path):
    out, _ = finish(begin([*TORCHRUN, 2], *YAML, "OUTPUT_DIR", tmp_path))
    assert_same(final(tmp_path), final(alone), rtol=1e-4, atol=1e-6)
    assert_same(metrics(tmp_path), metrics(alone), rtol=1e-4, atol=1e-5)
    # only the main process writes files, except that each process has a log
    names = {x.name for x in tmp_path.iterdir()} - {"log.txt.rank1"}
    assert {x for x in names if "events" not in x} == {
        x.name for x in alone.iterdir() if "events" not in x.name
    }
    assert {"results.json", "student.pth", "student.yaml", "model_0000001.pth"} <= names
    assert sum("events" in x for x in names) == 1
    assert out.count("Saving checkpoint to") == 3  # after iterations 1 and 3, and the last one


def test_two_processes_resume_what_one_began(alone, tmp_path):
    shutil.copy(alone / "model_0000001.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    args = [*YAML[:2], "--resume", *YAML[2:], "OUTPUT_DIR", tmp_path]
    out, _ = finish(begin([*TORCHRUN, 2], *args))
    # nothing is drawn here, so that it is exact all the same, images and flips included
    assert "The checkpoint is one of 1 processes, not of 2: this resume is not exact" in out
    assert_same(final(tmp_path), final(alone), rtol=1e-4, atol=1e-6)


LAZY = [
    "--config-file", "configs/ssimkd_R50.py", "train.device=cpu", "train.init_checkpoint=",
    "model.distiller.teacher.config=configs/shapes/teacher.yaml",
    "model.distiller.teacher.weights=configs/shapes/teacher.pth",
    "model.distiller.adapter=conv1x1", "model.roi_heads.num_classes=4", "optimizer.lr=1e-6",
    "dataloader.train.dataset.names=ssimkd_shapes_train",
    "dataloader.test.dataset.names=ssimkd_shapes_val",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=32",
    "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0", "train.checkpointer.period=2", "+train.seed=1",
]  # fmt: skip


@pytest.mark.soak
def test_torchrun_starts_a_lazy_config_and_one_process_resumes_it(few_images, tmp_path):
    out = f"train.output_dir={tmp_path}"
    finish(begin([*TORCHRUN, 2], *LAZY, out, "train.max_iter=2"))
    assert {"model_final.pth", "student.yaml", "results.json", "log.txt.rank1"} <= {
        x.name for x in tmp_path.iterdir()
    }
    before = final(tmp_path)
    out, _ = finish(
        begin([sys.executable], *LAZY[:2], "--resume", *LAZY[2:], out, "train.max_iter=3")
    )
    assert "Starting training from iteration 2" in out and "not exact" in out
    assert any(not torch.equal(v, before[k]) for k, v in final(tmp_path).items())


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(x) for x in f.read().split()]


@pytest.mark.soak
def test_a_killed_process_ends_the_run_and_it_can_be_resumed(few_images, tmp_path):
    args = [*YAML, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 100000]
    run = begin([*TORCHRUN, 2], *args)
    while not (tmp_path / "last_checkpoint").exists():
        assert run.poll() is None
        time.sleep(0.1)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    start = time.monotonic()
    _, err = finish(run, code=1)
    assert time.monotonic() - start < 90  # seconds, of which torchrun grants 30 to the others
    assert "Signal 9 (SIGKILL) received by PID" in err
    done = torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text())["iteration"]
    args[-1] = done + 3
    out, _ = finish(begin([sys.executable], *args[:2], "--resume", *args[2:]))
    assert f"Starting training from iteration {done + 1}" in out


@pytest.mark.soak
@pytest.mark.parametrize(
    "opts, said",
    [
        (["MODEL.NO_KEY", "1"], "error: MODEL.NO_KEY 1"),  # before they form a process group
        (["MODEL.DISTILL.TEACHER.WEIGHTS", "README.md"], "error: MODEL.DISTILL.TEACHER.WEIGHTS"),
    ],
)
def test_an_error_that_all_processes_have_is_printed_once(few_images, tmp_path, opts, said):
    _, err = finish(begin([*TORCHRUN, 2], *YAML, "OUTPUT_DIR", tmp_path, *opts), code=1)
    assert sum(line.startswith(said) for line in err.splitlines()) == 1
