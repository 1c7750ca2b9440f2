"""Checkpoints: crashes while one is written, which one is resumed, and which are refused."""

import multiprocessing
import os
import signal
import sys

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from ssimkd import ConfigError
from ssimkd.checkpoint.run_checkpointer import RunCheckpointer
from torch import nn

FORK = multiprocessing.get_context("fork")


def model_of(value):
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def save(folder, value, iteration):
    checkpointer = RunCheckpointer(model_of(value), str(folder))
    checkpointer.save(f"model_{iteration:07d}", iteration=iteration)


def resume(folder):
    """The iteration that a resume finds. Its weights have that value."""
    model = model_of(-1.0)
    found = RunCheckpointer(model, str(folder)).resume_or_load("")
    assert (model.weight == found["iteration"]).all()
    return found["iteration"]


def crash(folder, number):
    """Saves, and kills the process before it opens or renames a file for the n-th time."""
    calls = iter(range(1, 1000))

    def hook(event, args):
        touched = event in ("open", "os.rename") and str(args[0]).startswith(str(folder))
        if touched and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(folder, 2.0, 2)


def test_a_crash_at_any_moment_of_saving_leaves_a_complete_checkpoint(tmp_path):
    found = []
    for number in range(1, 20):
        folder = tmp_path / str(number)
        folder.mkdir()
        save(folder, 1.0, 1)
        process = FORK.Process(target=crash, args=(folder, number))
        process.start()
        process.join()
        found.append(resume(folder))
        save(folder, 3.0, 3)  # Files that the crash left behind do no harm.
        assert resume(folder) == 3
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    # Each of two files is opened and renamed, and its folder is opened: six crashes, and one run
    # without a crash.
    assert found == sorted(found) and len(found) == 7
    assert found[0] == 1 and found[-1] == 2


def test_stock_detectron2_reads_what_is_written(tmp_path):
    save(tmp_path, 5.0, 5)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000005.pth"]
    model = model_of(0.0)
    stock = DetectionCheckpointer(model, str(tmp_path))
    assert stock.resume_or_load("")["iteration"] == 5 and (model.weight == 5).all()


def test_without_last_checkpoint_the_newest_one_is_resumed(tmp_path):
    assert not RunCheckpointer(model_of(0.0), str(tmp_path / "nowhere")).has_checkpoint()
    for iteration in (1, 2, 3):
        save(tmp_path, float(iteration), iteration)
    (tmp_path / "student.pth").write_bytes(b"")
    os.remove(tmp_path / "last_checkpoint")
    assert resume(tmp_path) == 3
    for content in (b"", b"\xff\xfe"):  # stock Detectron2 was killed, the disk is damaged
        (tmp_path / "last_checkpoint").write_bytes(content)
        assert resume(tmp_path) == 3
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")  # 3 may be an older run's.
    os.truncate(tmp_path / "model_0000002.pth", 100)
    assert resume(tmp_path) == 1


def test_a_crash_just_before_the_final_checkpoint_does_not_lose_it(tmp_path):
    save(tmp_path, 5.0, 5)
    checkpointer = RunCheckpointer(model_of(0.0), str(tmp_path))
    checkpointer.resume_or_load("")
    checkpointer.write_final()  # no step was left
    last = (tmp_path / "model_0000005.pth").read_bytes()
    assert (tmp_path / "model_final.pth").read_bytes() == last
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    checkpointer.save("model_0000006", iteration=6)
    checkpointer.write_final()  # A step was taken, so that Detectron2's hook writes the file.
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000006.pth"


def test_a_damaged_byte_is_found_or_has_no_effect(tmp_path):
    """Every fifth byte of the archive's directory, and every 97th of the rest, is changed."""
    save(tmp_path, 4.0, 4)
    path = tmp_path / "model_0000004.pth"
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    faults = 0
    for place in [*range(0, directory, 97), *range(directory, len(content), 5)]:
        damaged = bytearray(content)
        damaged[place] ^= 255
        path.write_bytes(damaged)
        try:
            assert resume(tmp_path) == 4
        except ConfigError as error:
            assert path.name in str(error)
            faults += 1
    assert faults > 20


def test_evaluating_without_a_checkpoint_is_an_error(tmp_path):
    (tmp_path / "last_checkpoint").write_text("")
    with pytest.raises(ConfigError, match="has no checkpoint to resume from"):
        RunCheckpointer(model_of(0.0), str(tmp_path), require_all=True).resume_or_load("")


def test_a_new_run_moves_the_earlier_checkpoints_and_results(tmp_path):
    for iteration in (1, 2):
        save(tmp_path, float(iteration), iteration)
    (tmp_path / "model_final.pth").write_text("final")
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "inference").mkdir()
    checkpointer = RunCheckpointer(model_of(0.0), str(tmp_path))
    checkpointer.move_earlier_run()
    assert not checkpointer.has_checkpoint()
    folder, final = sorted(os.listdir(tmp_path))
    assert final == "model_final.pth" and resume(tmp_path / folder) == 2
    assert len(os.listdir(tmp_path / folder)) == 5
    checkpointer.move_earlier_run()
    assert sorted(os.listdir(tmp_path)) == [folder, final]


def test_a_new_run_does_not_overwrite_its_teacher(tmp_path):
    def start(name, resume):
        teacher = {"file": str(tmp_path / name), "sha256": ""}
        run = {"teachers": {"MODEL.DISTILL.TEACHER.WEIGHTS": teacher}}
        RunCheckpointer(model_of(0.0), str(tmp_path), run=run).resume_or_load("", resume=resume)

    start("big_teacher.pth", resume=False)  # a run writes no such file
    for resume in (False, True):  # there is nothing to resume
        message = "holds the teacher's weights, .*: name another folder"
        with pytest.raises(ConfigError, match=message):
            start("model_final.pth", resume)


def test_processes_that_see_different_checkpoints_stop(tmp_path, monkeypatch):
    save(tmp_path, 1.0, 1)
    monkeypatch.setattr(comm, "all_gather", lambda path: [path, "model_0000000.pth"])
    for folder, seen in ((tmp_path, "model_0000001.pth"), (tmp_path / "empty", "none")):
        with pytest.raises(ConfigError, match=f"processes see different.*sees .*{seen}"):
            resume(folder)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    "model, parameters, message",
    [
        (nn.Linear(4, 2), 2, r"weight is \(2, 3\) instead of \(2, 4\)"),
        (nn.Sequential(nn.Linear(3, 2)), 2, "0.weight is missing; 0.bias is missing"),
        (nn.Linear(3, 2), 1, "cannot be loaded: ValueError: loaded state dict"),
    ],
)
def test_a_resume_with_another_model_or_optimizer_is_an_error(tmp_path, model, parameters, message):
    before = nn.Linear(3, 2)
    state = sgd(before.parameters())
    RunCheckpointer(before, str(tmp_path), trainer=state).save("model_0000001", iteration=1)
    state = sgd(list(model.parameters())[:parameters])
    with pytest.raises(ConfigError, match=rf"model_0000001.pth .*{message}"):
        RunCheckpointer(model, str(tmp_path), trainer=state).resume_or_load("")


def test_weights_without_a_training_state_are_not_resumed(tmp_path):
    save(tmp_path, 1.0, 1)
    model = model_of(0.0)
    checkpointer = RunCheckpointer(model, str(tmp_path), trainer=sgd(model.parameters()))
    with pytest.raises(ConfigError, match=r"without the state of their training \(trainer\)"):
        checkpointer.resume_or_load("")


@pytest.fixture
def detector():
    return torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 3), "head": torch.nn.Linear(3, 4)})


def load(model, path, whole, **changes):
    torch.save({**model.state_dict(), **changes}, path)
    RunCheckpointer(model, require_all=whole).load(str(path))


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_of_another_model_is_an_error(detector, tmp_path, whole):
    load(detector, tmp_path / "x.pth", whole)
    with pytest.raises(ConfigError, match=r"x.pth .*backbone.bias is \(1,\) instead of \(3,\)"):
        load(detector, tmp_path / "x.pth", whole, **{"backbone.bias": torch.zeros(1)})
    torch.save({"nothing": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="x.pth .*backbone.weight is missing"):
        RunCheckpointer(detector, require_all=whole).load(str(tmp_path / "x.pth"))


def test_a_head_of_other_classes_is_a_warning_unless_all_is_required(detector, tmp_path, caplog):
    head = {"head.weight": torch.zeros(9, 3), "head.bias": torch.zeros(9)}
    load(detector, tmp_path / "x.pth", False, **head)
    assert "head.weight" in caplog.text
    with pytest.raises(ConfigError, match=r"head.weight is \(9, 3\) instead of \(4, 3\)"):
        load(detector, tmp_path / "x.pth", True, **head)


def test_a_resume_without_a_checkpoint_warns(tmp_path, caplog):
    checkpointer = RunCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.resume_or_load("", resume=True)
    assert f"--resume: {tmp_path} has no checkpoint, so the run starts anew" in caplog.text
    torch.save({"model": checkpointer.model.state_dict()}, tmp_path / "x.pth")
    evaluated = RunCheckpointer(checkpointer.model, str(tmp_path), require_all=True)
    evaluated.resume_or_load(str(tmp_path / "x.pth"), resume=True)
    assert f"has no checkpoint, so {tmp_path / 'x.pth'} is taken" in caplog.text
