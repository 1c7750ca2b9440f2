"""How the processes of a run find each other, and how all of them end when one fails."""

import os
import signal
import time
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from processes import fork, free_port, in_processes, options
from ssimkd import ConfigError
from ssimkd.engine import launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

TORCHRUN = {**dict.fromkeys(launch.VARIABLES, "1"), "RANK": "0", "LOCAL_RANK": "0"}


def test_torchrun_sets_all_of_its_variables():
    assert launch.started_by_torchrun(TORCHRUN)
    for name in TORCHRUN:  # another program may have set a single one, such as LOCAL_RANK
        assert not launch.started_by_torchrun({k: v for k, v in TORCHRUN.items() if k != name})


def place():
    """Where this process is, as Detectron2 sees it, and the sum of all ranks."""
    ranks = comm.all_gather(comm.get_rank())
    return comm.get_local_rank(), comm.get_local_size(), dist.get_backend(), sum(ranks)


def test_torchrun_starts_processes():
    assert in_processes(2, place) == [(0, 2, "gloo", 1), (1, 2, "gloo", 1)]


def test_num_gpus_is_refused_under_torchrun(monkeypatch, capsys):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    args = options()
    args.num_gpus = 8
    with pytest.raises(SystemExit, match="--num-gpus: torchrun has started"):
        launch.start(None, None, args)


def test_a_process_that_waits_in_vain_for_the_others_ends_with_an_error(monkeypatch):
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit, match="process 1 of 2 did not meet the others at localhost:"):
        launch.start(None, None, options(minutes=0.03))


@contextmanager
def ends_within(seconds):
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def fail(how):
    """The second process fails while the first waits for it."""
    if comm.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raises":
            raise KeyError("what went wrong")
        if how == "hangs":
            time.sleep(600)
        raise ConfigError("SOME.KEY: wrong")
    if how in ("killed", "raises"):  # torchrun names the process that fails first
        time.sleep(600)
    comm.synchronize()


@pytest.mark.parametrize(
    "how, said",
    [
        ("killed", "Signal 9 (SIGKILL) received by PID"),
        ("raises", "KeyError: 'what went wrong'"),
        ("wrong", "error: SOME.KEY: wrong\n"),
    ],
)
def test_one_process_that_fails_ends_the_others(how, said, capfd):
    with ends_within(40), pytest.raises(ChildFailedError) as failed:
        in_processes(2, fail, how)
    # torchrun's exception has the text; other processes may add that they lost the connection
    shown = str(failed.value) if how != "wrong" else capfd.readouterr().err
    assert shown.count(said) == 1


def test_a_process_that_hangs_ends_the_run():
    with ends_within(40), pytest.raises(ChildFailedError) as failed:
        in_processes(2, fail, "hangs", minutes=0.05)
    assert failed.value.get_first_failure()[0] == 0  # this process gave up waiting


def refuse():
    raise ConfigError("SOME.KEY: wrong")


def test_an_error_that_every_process_has_is_printed_once(capfd):
    with pytest.raises(ChildFailedError):
        in_processes(3, refuse)
    assert capfd.readouterr().err.count("error: SOME.KEY: wrong\n") == 1


def test_nan_on_two_processes_is_printed_once_though_their_images_differ():
    store, codes = dist.HashStore(), []
    for what in ("a is nan (iteration 3, images: 1.jpg)", "a is nan (iteration 3, images: 2.jpg)"):
        with pytest.raises(SystemExit) as ended, launch.print_error_once(store):
            raise FloatingPointError(what)
        codes.append(ended.value.code)
    assert codes == ["error: a is nan (iteration 3, images: 1.jpg)", 1]


def own_launch(main, count, args, **_):
    """Stands in for Detectron2's launch, which needs GPUs up to v0.6."""
    fork(2, main, *args)


@pytest.mark.parametrize(
    "how, raised, said",
    [
        ("killed", SystemExit, "error: process 1 terminated with signal SIGKILL"),
        ("raises", mp.ProcessRaisedException, "KeyError: 'what went wrong'"),
        ("wrong", SystemExit, "^error: SOME.KEY: wrong$"),
    ],
)
def test_a_process_of_detectron2s_launch_that_fails_ends_the_others(how, raised, said, monkeypatch):
    def main(rank, _):
        if rank == 0:
            time.sleep(600)
        monkeypatch.setattr(comm, "get_rank", lambda: 1)
        fail(how)

    monkeypatch.setattr(launch.engine, "launch", own_launch)
    with ends_within(40), pytest.raises(raised, match=said):
        launch.start(main, lambda _: "cpu", options())


def test_detectron2s_own_launch(monkeypatch, tmp_path):
    if not hasattr(comm, "create_local_process_group"):
        pytest.skip("this Detectron2 launches on GPUs alone")
    args = options()
    args.num_gpus, args.out = 2, tmp_path
    launch.start(write_place, lambda _: "cpu", args)
    assert {x.name for x in tmp_path.iterdir()} == {str((i, 2, "gloo", 1)) for i in range(2)}


def write_place(args):
    (args.out / str(place())).touch()


def test_two_processes_that_see_the_same_gpu_are_refused(monkeypatch):
    gpus = {0: SimpleNamespace(uuid="GPU-1"), 1: SimpleNamespace(uuid="GPU-2")}
    joined, current, store = [], [], dist.HashStore()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.get)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: joined.append(args))
    monkeypatch.setattr(launch, "create_local_process_group", lambda size: None)

    def join(rank):
        places = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2)
        for name, value in places.items():
            monkeypatch.setenv(name, str(value))
        launch.join_group(store, "cuda", timedelta(1))

    join(0)
    join(1)
    assert current == [0, 1] and len(joined) == 2
    del gpus[1]
    with pytest.raises(ConfigError, match="2 processes share this machine, .* the same GPU"):
        join(1)
