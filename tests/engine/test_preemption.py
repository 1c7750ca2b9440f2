"""A signal ends a run, in all its processes, with a checkpoint to resume from."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from ssimkd.checkpoint.run_checkpointer import RunCheckpointer
from ssimkd.engine.hooks import CallAfterTraining, EvalHook
from ssimkd.engine.preemption import EXIT_STATUS, SAME, StopOnSignal, forward_to_children
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FORK = multiprocessing.get_context("fork")


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, batch):
        return {"loss": self.weight.sum()}


def stop_one_of_two(rank, folder):
    """The second process gets a signal in its third iteration; both end after the tenth."""
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


def test_a_signal_in_the_last_iteration_ends_the_run_after_the_export():
    done = []
    stop = StopOnSignal(lambda: done.append("collected"), None)
    hooks = [CallAfterTraining(lambda: done.append("exported")), stop]
    hooks.append(EvalHook(0, lambda: done.append("evaluated")))
    with pytest.raises(SystemExit) as ended:
        end_with(1, hooks)
    assert ended.value.code == EXIT_STATUS and done == ["exported"]


@pytest.mark.parametrize("again", [False, True])
def test_the_first_ctrl_c_writes_a_checkpoint_and_the_second_ends_at_once(tmp_path, again):
    def batches():
        signal.raise_signal(signal.SIGINT)
        if again:
            time.sleep(SAME + 0.1)
            signal.raise_signal(signal.SIGINT)
        while True:
            yield [{}]

    model = Sum()
    trainer = SimpleTrainer(model, batches(), torch.optim.SGD(model.parameters(), lr=0.1))
    checkpointer = RunCheckpointer(model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([StopOnSignal(lambda: None, checkpointer)])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt if again else SystemExit) as ended:
        trainer.train(0, 100)
    assert again or ended.value.code == 130
    assert (tmp_path / "model_0000000.pth").exists() != again
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_after_the_last_iteration_is_handled_by_the_former_handler():
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
