"""Runs train_net.py in other processes, which share the imports and can be killed."""

import itertools
import json
import multiprocessing
import os
import runpy
import signal
import sys

import torch
from conftest import ROOT

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(
    [
        "ssimkd.engine.arguments",
        "ssimkd.engine.yaml_driver",
        "ssimkd.engine.lazy_driver",
        "torch.utils.tensorboard",
    ]
)
SIZES = {"max_iter": 6, "checkpoint_period": 2, "eval_period": 3, "workers": 0}


def start(words, log, fault=None):
    """Starts `train_net.py` with these words; returns the process.

    All processes have the environment of the first call, because the imports read
    DETECTRON2_DATASETS.

    Args:
        words (list): the command line.
        log (Path): gets what the process prints.
        fault (callable or None): called in the process before the run; it causes a fault.
    """
    process = SPAWN.Process(target=enter, args=([*map(str, words)], str(log), fault))
    process.start()
    return process


def finish(words, log, fault=None, seconds=300):
    """Runs it to its end; returns the exit status, which is None if it takes too long."""
    process = start(words, log, fault)
    process.join(seconds)
    return process.exitcode


def enter(words, log, fault):
    os.chdir(ROOT)
    torch.set_num_threads(1)  # so that sums have the same order
    multiprocessing.set_start_method(
        "fork", force=True
    )  # the default of a process that is started from a shell
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    if fault is not None:
        fault()
    sys.argv = ["train_net.py", *words]
    runpy.run_path("train_net.py", run_name="__main__")


def yaml_words(out, *opts, resume=False, flags=(), **sizes):
    """The words of a run with SGD, adapters, a loss that has weights and images without labels."""
    n = {**SIZES, **sizes}
    key = "MODEL.DISTILL"
    return [
        "--config-file", "configs/shapes/ssimkd.yaml", *flags, *["--resume"] * resume,
        "OUTPUT_DIR", out, "SOLVER.MAX_ITER", n["max_iter"], "SOLVER.IMS_PER_BATCH", 2,
        "SOLVER.CHECKPOINT_PERIOD", n["checkpoint_period"], "TEST.EVAL_PERIOD", n["eval_period"],
        "INPUT.MIN_SIZE_TEST", 32, "DATALOADER.NUM_WORKERS", n["workers"],
        f"{key}.ADAPTER", "conv1x1", f"{key}.LOSSES", ("ssim", "fgd"),
        f"{key}.CHECK_IMAGES", 2, "SOLVER.IMS_PER_BATCH_UNLABELED", 1,
        "DATASETS.UNLABELED", ("ssimkd_shapes_train[50%:]",), *opts,
    ]  # fmt: skip


def lazy_words(out, *opts, resume=False, flags=(), **sizes):
    """The words of a run with AdamW, adapters, a loss with weights and images without labels."""
    n = {**SIZES, **sizes}
    return [
        "--config-file", "tests/engine/lazy_faults.py", *flags, *["--resume"] * resume,
        f"train.output_dir={out}", f"train.max_iter={n['max_iter']}", "+train.seed=1",
        "dataloader.train.total_batch_size=2", f"dataloader.train.num_workers={n['workers']}",
        f"dataloader.unlabeled.num_workers={n['workers']}",
        f"train.checkpointer.period={n['checkpoint_period']}",
        f"train.eval_period={n['eval_period']}", "+train.check_images=2",
        "dataloader.test.mapper.augmentations.0.short_edge_length=32", *opts,
    ]  # fmt: skip


class DieInCheckpoint:
    """Kills the process when half of the n-th checkpoint is written."""

    def __init__(self, number):
        self.number = number

    def __call__(self):
        save, calls = torch.save, itertools.count(1)

        def half(data, file):
            save(data, file)
            if "model" in data and next(calls) == self.number:  # an evaluation writes other files
                file.truncate(file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half


class DieInEvaluation:
    """Kills the process at the second image of the first evaluation."""

    def __call__(self):
        from detectron2.evaluation import COCOEvaluator

        process, calls = COCOEvaluator.process, itertools.count(1)

        def die(*args):
            if next(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            process(*args)

        COCOEvaluator.process = die


def saved(path):
    """A checkpoint's weights, optimizer and iteration: name -> tensor."""
    checkpoint = torch.load(path, weights_only=True)
    inner = checkpoint["trainer"].get("_trainer", checkpoint["trainer"])
    found = {f"model.{name}": tensor for name, tensor in checkpoint["model"].items()}
    for slot, state in inner["optimizer"]["state"].items():
        found.update({f"optimizer.{slot}.{key}": value for key, value in state.items()})
    return {**found, "iteration": torch.tensor(checkpoint["iteration"])}


def same(path, expected):
    """Whether a checkpoint equals what :func:`saved` returned, bit by bit."""
    found = saved(path)
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


class Reference:
    """A run without any fault, with which other runs of the same words are compared."""

    def __init__(self, words, folder):
        self.words, self.out = words, folder / "whole"
        self.out.mkdir()
        assert self.finish(self.out) == 0, self.log_of(self.out)[-3000:]
        self.final = saved(self.out / "model_final.pth")

    def finish(self, out, *opts, fault=None, **options):
        return finish(self.words(out, *opts, **options), out / "out.txt", fault)

    def start(self, out, **options):
        return start(self.words(out, **options), out / "out.txt")

    def log_of(self, out):
        return (out / "out.txt").read_text()

    def weights(self):
        return torch.load(self.out / "model_final.pth", weights_only=True)["model"]

    def results(self):
        return json.loads((self.out / "results.json").read_text())

    def resumes(self, out, **options):
        """Resumes the run in a folder; whether its last checkpoint is the same, bit by bit."""
        assert self.finish(out, resume=True, **options) == 0, self.log_of(out)[-3000:]
        return same(out / "model_final.pth", self.final)
