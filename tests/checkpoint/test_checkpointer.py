"""Checkpoints: a crash at any moment of writing, what is gone on from, what is refused."""

import logging
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from ssimkd import ConfigError
from ssimkd.checkpoint.run_checkpointer import RunCheckpointer, check_state
from ssimkd.checkpoint.same_run import check_same_run, flatten
from ssimkd.engine.hooks import CallAfterTraining, EvalHook
from ssimkd.engine.preemption import EXIT_STATUS, StopOnSignal, forward_to_children
from ssimkd.engine.run_record import read_record, record_run
from ssimkd.utils.atomic import atomic_write
from ssimkd.utils.random_state import get_random_state
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FORK = multiprocessing.get_context("fork")


def model_of(value):
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def save(folder, value, iteration):
    RunCheckpointer(model_of(value), str(folder)).save(
        f"model_{iteration:07d}", iteration=iteration
    )


def resume(folder):
    """The iteration that a resume finds, with the weights of that iteration."""
    model = model_of(-1.0)
    found = RunCheckpointer(model, str(folder)).resume_or_load("")
    assert (model.weight == found["iteration"]).all()
    return found["iteration"]


def crash(folder, number):
    """kill -9 before the n-th opening or renaming of a file in a folder."""
    calls = iter(range(1, 1000))

    def hook(event, args):
        touched = event in ("open", "os.rename") and str(args[0]).startswith(str(folder))
        if touched and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(folder, 2.0, 2)


def test_a_crash_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path):
    found = []
    for number in range(1, 20):
        folder = tmp_path / str(number)
        folder.mkdir()
        save(folder, 1.0, 1)
        process = FORK.Process(target=crash, args=(folder, number))
        process.start()
        process.join()
        found.append(resume(folder))
        save(folder, 3.0, 3)  # what the crash left behind is in nobody's way
        assert resume(folder) == 3
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    # two files, each opened, renamed, and its folder opened: six moments, and the run without one
    assert found == sorted(found) and len(found) == 7
    assert found[0] == 1 and found[-1] == 2


def test_stock_detectron2_reads_what_is_written(tmp_path):
    save(tmp_path, 5.0, 5)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000005.pth"]
    model = model_of(0.0)
    stock = DetectionCheckpointer(model, str(tmp_path))
    assert stock.resume_or_load("")["iteration"] == 5 and (model.weight == 5).all()


def test_a_failed_writing_leaves_the_older_file(tmp_path):
    path = str(tmp_path / "results.json")
    with atomic_write(path, "w") as f:
        f.write("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "w") as f:
        f.write("new")
        raise KeyboardInterrupt
    assert open(path).read() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_without_last_checkpoint_the_newest_one_counts(tmp_path):
    assert not RunCheckpointer(model_of(0.0), str(tmp_path / "nowhere")).has_checkpoint()
    for iteration in (1, 2, 3):
        save(tmp_path, float(iteration), iteration)
    (tmp_path / "student.pth").write_bytes(b"")
    os.remove(tmp_path / "last_checkpoint")
    assert resume(tmp_path) == 3
    (tmp_path / "last_checkpoint").write_text("")  # stock Detectron2, killed
    assert resume(tmp_path) == 3
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe")  # a damaged disk
    assert resume(tmp_path) == 3
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")  # 3 may be an older run's
    os.truncate(tmp_path / "model_0000002.pth", 100)
    assert resume(tmp_path) == 1


def test_a_crash_just_before_the_final_checkpoint_does_not_lose_it(tmp_path):
    save(tmp_path, 5.0, 5)
    checkpointer = RunCheckpointer(model_of(0.0), str(tmp_path))
    checkpointer.resume_or_load("")
    checkpointer.complete()  # no step was left
    last = (tmp_path / "model_0000005.pth").read_bytes()
    assert (tmp_path / "model_final.pth").read_bytes() == last
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    checkpointer.save("model_0000006", iteration=6)
    checkpointer.complete()  # a step was taken: its own final checkpoint is the hook's to write
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000006.pth"


def test_with_no_whole_one_it_does_not_start_anew_in_silence(tmp_path):
    save(tmp_path, 1.0, 1)
    os.truncate(tmp_path / "model_0000001.pth", 100)
    with pytest.raises(ConfigError, match="none of the checkpoints.*model_0000001.pth"):
        resume(tmp_path)


def test_a_damaged_byte_is_found_or_does_no_harm(tmp_path):
    """The whole directory of the file and, here and there, all else."""
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
        except ConfigError:  # none is whole
            faults += 1
    assert faults > 20


def test_random_values_are_not_evaluated(tmp_path):
    (tmp_path / "last_checkpoint").write_text("")
    with pytest.raises(ConfigError, match="has no checkpoint to go on from"):
        RunCheckpointer(model_of(0.0), str(tmp_path), whole=True).resume_or_load("")


def test_a_run_that_starts_anew_is_not_resumed_as_the_earlier_one(tmp_path):
    for iteration in (1, 2):
        save(tmp_path, float(iteration), iteration)
    (tmp_path / "model_final.pth").write_text("final")
    checkpointer = RunCheckpointer(model_of(0.0), str(tmp_path))
    checkpointer.move_earlier_checkpoints()
    assert not checkpointer.has_checkpoint()  # killed before its own first one
    folder, final = sorted(os.listdir(tmp_path))
    assert final == "model_final.pth" and resume(tmp_path / folder) == 2
    assert len(os.listdir(tmp_path / folder)) == 3
    checkpointer.move_earlier_checkpoints()
    assert sorted(os.listdir(tmp_path)) == [folder, final]


def test_processes_that_see_different_checkpoints_stop(tmp_path, monkeypatch):
    save(tmp_path, 1.0, 1)
    monkeypatch.setattr(comm, "all_gather", lambda path: [path, "model_0000000.pth"])
    for folder, seen in ((tmp_path, "model_0000001.pth"), (tmp_path / "empty", "none")):
        with pytest.raises(ConfigError, match=f"the processes see different.* this one.*{seen}"):
            resume(folder)


class State:
    """Something with a torch optimizer's state."""

    def __init__(self, *parameters):
        self.optimizer = torch.optim.SGD(parameters, lr=0.1)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    "model, parameters, message",
    [
        (nn.Linear(4, 2), 2, r"weight is \(2, 3\) instead of \(2, 4\)"),
        (nn.Sequential(nn.Linear(3, 2)), 2, "0.weight is missing; 0.bias is missing"),
        (nn.Linear(3, 2), 1, "cannot be loaded: ValueError: loaded state dict"),
    ],
)
def test_what_makes_a_resume_impossible_is_an_error(tmp_path, model, parameters, message):
    before = nn.Linear(3, 2)
    state = State(*before.parameters())
    RunCheckpointer(before, str(tmp_path), trainer=state).save("model_0000001", iteration=1)
    state = State(*list(model.parameters())[:parameters])
    with pytest.raises(ConfigError, match=rf"model_0000001.pth .*{message}"):
        RunCheckpointer(model, str(tmp_path), trainer=state).resume_or_load("")


def test_weights_alone_are_not_resumed(tmp_path):
    save(tmp_path, 1.0, 1)
    model = model_of(0.0)
    checkpointer = RunCheckpointer(model, str(tmp_path), trainer=State(*model.parameters()))
    with pytest.raises(ConfigError, match=r"without the state of their training \(trainer\)"):
        checkpointer.resume_or_load("")


@pytest.mark.parametrize(
    "changes, exact, message",
    [
        ({"iteration": "x"}, {}, "its iteration is 'x'"),
        ({"iteration": 10**9}, {}, "its iteration is 1000000000"),
        ({}, {"data": {"batches": "x"}}, "its place in the training data"),
        ({}, {"random": [{"python": 1}]}, "its random state"),
        ({}, {}, ""),
    ],
)
def test_a_damaged_state_is_found_before_the_training(changes, exact, message):
    exact = {"random": [get_random_state()], "data": {"batches": 3}, **exact}
    trainer = {"iteration": 2, "hooks": {"ExactResume": exact}, **changes}
    checkpoint = {"iteration": 2, "trainer": trainer}
    if not message:
        return check_state(checkpoint)
    with pytest.raises(ConfigError, match=f"is damaged: {message}"):
        check_state(checkpoint)


def run_of(**settings):
    return {"settings": {k.replace("__", "."): v for k, v in settings.items()}, "teachers": {}}


def test_each_setting_that_differs_is_a_warning_but_for_where_a_run_lies(caplog):
    old = run_of(SOLVER__BASE_LR="0.1", OUTPUT_DIR="a", INPUT__FORMAT="BGR", GONE="1")
    new = run_of(SOLVER__BASE_LR="0.2", OUTPUT_DIR="b", INPUT__FORMAT="BGR", NEW="2")
    with caplog.at_level(logging.WARNING):
        check_same_run(old, new)
    assert [record.message for record in caplog.records] == [
        "--resume: GONE was 1 and is now not set",
        "--resume: NEW was not set and is now 2",
        "--resume: SOLVER.BASE_LR was 0.1 and is now 0.2",
    ]


def test_another_kind_of_optimizer_is_refused():
    old, new = run_of(optimizer___target_="SGD"), run_of(optimizer___target_="AdamW")
    with pytest.raises(ConfigError, match="optimizer._target_ was SGD and is now AdamW"):
        check_same_run(old, new)


def taught_by(**teachers):
    """Keys -> (first digits of the sha256, a setting of the teacher's config)."""
    found = {
        key: {"file": f"{digest}.pth", "sha256": digest, "config": {"MEAN": mean}}
        for key, (digest, mean) in teachers.items()
    }
    return {"settings": {}, "teachers": found}


def test_teachers_are_told_by_their_files_whatever_the_key(caplog):
    old = taught_by(TEACHER=("a", "1"))
    check_same_run(old, taught_by(TEACHERS=("a", "1")))
    check_same_run(taught_by(), old)
    assert not caplog.records
    check_same_run(old, taught_by(TEACHER=("a", "2")))
    assert caplog.messages == ["--resume: the teacher's MEAN was 1 and is now 2"]
    with pytest.raises(ConfigError, match=r"is another run's: TEACHERS: b.pth .* taught so far"):
        check_same_run(old, taught_by(TEACHERS=("b", "1")))
    with pytest.raises(ConfigError, match=r"TEACHER: a.pth has taught so far and is gone"):
        check_same_run(taught_by(B=("b", "1"), TEACHER=("a", "1")), taught_by(B=("b", "1")))


@pytest.mark.parametrize("content", ["", '[{"comm', "3"])
def test_an_unreadable_record_is_set_aside(tmp_path, caplog, content):
    (tmp_path / "run.json").write_text(content)
    with record_run(str(tmp_path)):
        assert len(read_record(str(tmp_path))) == 1
    assert (tmp_path / "run.json.unreadable").read_text() == content
    assert "run.json cannot be read and is left out" in caplog.text


def test_a_record_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "run.json.tmp").mkdir()
    with (
        pytest.raises(ConfigError, match="OUTPUT_DIR .* cannot write run.json"),
        record_run(str(tmp_path)),
    ):
        pass


def test_settings_are_words_that_stay_the_same_from_run_to_run():
    settings = {"a": {"b": [1, 2]}, "c": [{"d": nn.Linear}, 3], "e": object(), "f": {}}
    assert dict(flatten(settings)) == {
        "a.b": "[1, 2]", "c.0.d": "Linear", "c.1": "3", "e": "<object object>", "f": "{}"
    }  # fmt: skip


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, batch):
        return {"loss": self.weight.sum()}


def stop_one_of_two(rank, folder):
    """The second process gets the signal in its third iteration; the first writes, in the tenth."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    comm._LOCAL_PROCESS_GROUP = dist.group.WORLD

    def batches():
        for number in range(100):
            if rank == 1 and number == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.02 * rank)
            yield [{}]

    model = DistributedDataParallel(Sum())
    trainer = SimpleTrainer(model, batches(), torch.optim.SGD(model.parameters(), lr=0.1))
    checkpointer = RunCheckpointer(model, str(folder), trainer=trainer)
    collected = []
    trainer.register_hooks([StopOnSignal(lambda: collected.append(1), checkpointer)])
    try:
        trainer.train(0, 100)
    finally:
        (folder / f"iterations{rank}").write_text(f"{trainer.iter} {len(collected)}")


def test_all_processes_end_after_the_same_iteration(tmp_path):
    processes = [FORK.Process(target=stop_one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [EXIT_STATUS, EXIT_STATUS]
    assert (tmp_path / "iterations0").read_text() == (tmp_path / "iterations1").read_text() == "9 1"
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000009.pth"


def end_with(signal_at, hooks):
    """Trains for two iterations; the signal comes in one of them, or from a hook."""

    def batches():
        for number in range(2):
            if number == signal_at:
                signal.raise_signal(signal.SIGUSR1)
            yield [{}]

    model = Sum()
    trainer = SimpleTrainer(model, batches(), torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.register_hooks(hooks)
    trainer.train(0, 2)


def test_a_signal_in_the_last_iteration_ends_the_run_behind_the_export():
    done = []
    stop = StopOnSignal(lambda: done.append("collected"), None)
    hooks = [CallAfterTraining(lambda: done.append("exported")), stop]
    hooks.append(EvalHook(0, lambda: done.append("evaluated")))
    with pytest.raises(SystemExit) as ended:
        end_with(1, hooks)
    assert ended.value.code == EXIT_STATUS and done == ["exported"]


def test_a_signal_after_the_last_iteration_acts_as_ever():
    done = []
    before = signal.signal(signal.SIGUSR1, lambda *_: done.append("signalled"))

    def export():
        signal.raise_signal(signal.SIGUSR1)
        done.append("exported")

    try:
        end_with(None, [CallAfterTraining(export), StopOnSignal(lambda: None, None)])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert done == ["exported", "signalled"]


def wait_for_signal():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_STATUS))
    signal.pause()


def parent_of_two(path):
    forward_to_children()
    children = [FORK.Process(target=wait_for_signal) for _ in range(2)]
    for child in children:
        child.start()
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    for child in children:
        child.join()
    path.write_text(str([child.exitcode for child in children]))


def test_the_parent_passes_a_signal_on(tmp_path):
    parent = FORK.Process(target=parent_of_two, args=(tmp_path / "said",))
    parent.start()
    parent.join()
    assert (tmp_path / "said").read_text() == f"[{EXIT_STATUS}, {EXIT_STATUS}]"


def parent_of_none():
    forward_to_children()
    signal.raise_signal(signal.SIGTERM)


def test_a_parent_without_children_ends_by_the_signal():
    parent = FORK.Process(target=parent_of_none)
    parent.start()
    parent.join()
    assert parent.exitcode == -signal.SIGTERM
