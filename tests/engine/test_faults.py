"""After a kill, a signal or a full disk, a resumed run ends as a run without a fault does."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from runs import DieInCheckpoint, DieInEvaluation, same


def wait_for(path, process):
    while not path.exists():
        assert process.is_alive(), "it has ended before"
        time.sleep(0.005)


def kill_in_training(reference, out):
    process = reference.start(out, eval_period=0)
    wait_for(out / "model_0000001.pth", process)
    time.sleep(random.random() * 0.05)  # well before the run's end
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def kill_in_checkpoint(reference, out, number=2):
    assert reference.finish(out, fault=DieInCheckpoint(number)) == -signal.SIGKILL
    half = out / f"model_{2 * number - 1:07d}.pth.tmp"
    assert 0 < half.stat().st_size < (reference.out / half.stem).stat().st_size
    assert not (out / half.stem).exists()


def kill_in_evaluation(reference, out):
    assert reference.finish(out, fault=DieInEvaluation()) == -signal.SIGKILL
    assert not (out / "model_0000003.pth").exists()  # the evaluation is after iteration 3


class SignalInStep:
    """Sends SIGTERM to all processes of the job in the student's fourth forward."""

    def __call__(self):
        from ssimkd.modeling.distiller import Distiller

        forward, calls = Distiller.forward, itertools.count(1)

        def interrupted(*args):
            if next(calls) == 4:
                children = [process.pid for process in multiprocessing.active_children()]
                assert len(children) == 4  # two load images with labels, two those without
                subprocess.run(["kill", "-TERM", *map(str, [*children, os.getpid()])])
            return forward(*args)

        Distiller.forward = interrupted


def stop_by_signal(reference, out):
    options = dict(checkpoint_period=1000, eval_period=0, workers=2)
    status = reference.finish(out, fault=SignalInStep(), **options)
    assert status == 75, reference.log_of(out)[-3000:]
    assert [path.name for path in out.glob("model_*")] == ["model_0000003.pth"]
    assert "SIGTERM: stopped after 4 iterations of 6; model_0000003.pth" in reference.log_of(out)


def test_killed_in_training(yaml, tmp_path):
    kill_in_training(yaml, tmp_path)
    assert yaml.resumes(tmp_path)


def test_killed_while_a_checkpoint_is_written(lazy, tmp_path):
    kill_in_checkpoint(lazy, tmp_path)
    assert lazy.resumes(tmp_path)


def test_killed_in_an_evaluation(yaml, tmp_path):
    kill_in_evaluation(yaml, tmp_path)
    assert yaml.resumes(tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("repeat", range(3))
@pytest.mark.parametrize(
    "kill", [kill_in_training, kill_in_checkpoint, kill_in_evaluation, stop_by_signal]
)
def test_killed_anywhere_with_either_driver(reference, kill, repeat, tmp_path):
    kill(reference, tmp_path)
    assert reference.resumes(tmp_path)


@pytest.mark.soak
def test_killed_again_and_again(reference, tmp_path):
    """The process is killed every few seconds, at random moments."""
    for attempt in range(50):
        process = reference.start(tmp_path, resume=attempt > 0, checkpoint_period=1)
        process.join(4 + 4 * random.random())
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
    assert process.exitcode == 0
    assert same(tmp_path / "model_final.pth", reference.final)


def test_a_signal_ends_a_run_with_a_checkpoint_and_exit_status_75(lazy, tmp_path):
    stop_by_signal(lazy, tmp_path)
    assert lazy.resumes(tmp_path)


class LittleRoom:
    """Limits the size of every file, so that writing fails as it does on a full disk."""

    def __init__(self, size):
        self.size = size

    def __call__(self):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def test_a_full_disk_costs_no_checkpoint(lazy, tmp_path):
    first = lazy.out / "model_0000001.pth"
    shutil.copy(first, tmp_path)
    (tmp_path / "last_checkpoint").write_text(first.name)
    fault = LittleRoom(first.stat().st_size // 2)
    assert lazy.finish(tmp_path, resume=True, fault=fault) == 1
    last = lazy.log_of(tmp_path).splitlines()[-1]
    assert last.startswith("error: OUTPUT_DIR (.yaml) or train.output_dir (.py): cannot write")
    assert "model_0000003.pth" in last and str(tmp_path) in last and "File too large" in last
    assert [path.name for path in tmp_path.glob("model_*")] == [
        first.name
    ]  # no temporary file either
    assert lazy.resumes(tmp_path)


def test_a_truncated_checkpoint_is_named_and_left_out(yaml, tmp_path):
    for number in (1, 3, 5):
        shutil.copy(yaml.out / f"model_{number:07d}.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    os.truncate(tmp_path / "model_0000005.pth", 1_000_000)
    with open(tmp_path / "model_0000003.pth", "r+b") as f:  # the length stays right
        f.seek(1_000_000)
        f.write(bytes(4096))
    assert yaml.resumes(tmp_path)
    text = yaml.log_of(tmp_path)
    for number in (3, 5):
        assert f"model_{number:07d}.pth is incomplete or damaged and is skipped" in text
    assert "Starting training from iteration 2" in text


def test_a_resume_logs_every_key_that_has_changed(lazy, tmp_path):
    shutil.copy(lazy.out / "model_0000001.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    changed = ["model.distiller.losses.0.weight=2.0", "dataloader.train.num_workers=1"]
    assert lazy.finish(tmp_path, *changed, resume=True) == 0
    said = [line for line in lazy.log_of(tmp_path).splitlines() if "and is now" in line]
    assert len(said) == 1
    assert "model.distiller.losses.0.weight was not set and is now 2.0" in said[0]


def test_a_resume_with_another_or_a_missing_teacher_is_an_error(yaml, tmp_path):
    weights = "MODEL.DISTILL.TEACHER.WEIGHTS"
    shutil.copy(yaml.out / "model_0000001.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    teacher = torch.load("configs/shapes/teacher.pth")
    next(iter(teacher["model"].values())).mul_(1.01)
    torch.save(teacher, tmp_path / "teacher.pth")
    for path, message in (
        (tmp_path / "teacher.pth", "is another run's: its teachers were"),
        (tmp_path / "nowhere.pth", "there is no file"),
    ):
        assert yaml.finish(tmp_path, weights, path, resume=True) == 1
        last = yaml.log_of(tmp_path).splitlines()[-1]
        assert last.startswith("error: ") and message in last and str(path) in last


def test_evaluation_changes_nothing(yaml, tmp_path):
    """A run without evaluations has the same losses and weights."""
    assert yaml.finish(tmp_path, eval_period=0) == 0
    assert same(tmp_path / "model_final.pth", yaml.final)
    losses = [
        [
            json.loads(line)["total_loss"]
            for line in open(out / "metrics.json")
            if "total_loss" in line
        ]
        for out in (tmp_path, yaml.out)
    ]
    assert losses[0] == losses[1]


def test_a_run_whose_export_fails_is_evaluated_and_has_exit_status_1(reference, tmp_path):
    (tmp_path / "student.pth").mkdir()  # a folder, so that the file cannot be written
    assert reference.finish(tmp_path, max_iter=1, eval_period=0) == 1
    text = reference.log_of(tmp_path)
    last = text.splitlines()[-1]
    assert last.startswith("error: OUTPUT_DIR (.yaml) or train.output_dir (.py): cannot write the")
    assert str(tmp_path) in last and "Is a directory" in last
    assert "export failed: OUTPUT_DIR" in text and "Traceback" not in text
    assert (tmp_path / "results.json").exists() and (tmp_path / "model_final.pth").exists()
    (tmp_path / "student.pth").rmdir()
    assert reference.finish(tmp_path, max_iter=1, eval_period=0, resume=True) == 0
    assert (tmp_path / "student.pth").is_file()


class NanTeacher:
    """Puts NaN into the teacher's p3 in the second and fifth step, and where they are explained."""

    def __call__(self):
        from ssimkd.modeling.distiller import Distiller

        match, steps = Distiller.match, []

        def spoiled(*args):
            student, teacher, *predictions = match(*args)
            labeled = "instances" in args[1].records[0]
            steps.extend([1] * (labeled and student["p3"].requires_grad))
            if labeled and len(steps) in (2, 5):
                teacher["p3"][0, 0, 0, 0] = float("nan")
            return student, teacher, *predictions

        Distiller.match = spoiled


def test_a_run_leaves_out_the_allowed_number_of_steps_with_nan_and_then_ends(lazy, tmp_path):
    allow = "+train.skip_nonfinite_steps=1"
    assert lazy.finish(tmp_path, allow, fault=NanTeacher()) == 1
    text = lazy.log_of(tmp_path)
    left_out = next(line for line in text.splitlines() if "Left out a step (1 of 1" in line)
    assert "ssim_kd_loss is nan" in left_out and "(iteration 1, images: " in left_out
    assert "ssim_kd/p3 is nan, because the teacher's p3 holds NaN or infinity" in left_out
    last = text.splitlines()[-1]
    assert last.startswith("error: ssim_kd_loss is nan") and "(iteration 4, images: " in last
    assert last.count(".jpg") == 3


def test_a_run_with_nan_in_the_last_step_ends_in_one_line_without_results(yaml, tmp_path):
    diverge = ["SOLVER.BASE_LR", 1e9, "SOLVER.WARMUP_ITERS", 0]
    diverge += ["SOLVER.CLIP_GRADIENTS.ENABLED", False]
    assert yaml.finish(tmp_path, *diverge, max_iter=2) == 1
    text = yaml.log_of(tmp_path)
    assert text.splitlines()[-1].startswith("error: ") and "(iteration 1, images: " in text
    assert "Traceback" not in text
    assert "Traceback" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "results.json").exists()  # it was not evaluated
    assert (
        "has been overridden" not in text
    )  # torch's warning about an optimizer whose step was replaced
