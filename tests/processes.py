"""Several processes for a test, forked by torchrun's own agent, which spares the imports."""

import gc
import socket
from argparse import Namespace
from contextlib import contextmanager
from uuid import uuid4

import torch
import torch.multiprocessing as mp
from ssimkd.engine import launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def options(minutes=1.0):
    """What `launch.start` reads of a command line."""
    return Namespace(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto", timeout=minutes)


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


@contextmanager
def without_collector():
    """Around a fork: a child that clears away its parent's store waits for a thread it has not.

    No store is left behind for the children of other tests, such as those that load images.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


def fork(count, function, *args):
    """Runs `function(rank, *args)` in `count` processes.

    Raises:
        ProcessExitedException, ProcessRaisedException: one has failed.
    """
    with without_collector():
        mp.start_processes(function, args=args, nprocs=count, start_method="fork")


def in_processes(count, function, *args, minutes=1.0):
    """What `function(*args)` returns in each of `count` processes of `ssimkd.launch`, by rank.

    Args:
        minutes (float): until a collective operation is given up.

    Raises:
        ChildFailedError: one has failed.
    """

    def entry():
        torch.set_num_threads(1)
        found = []
        launch.start(lambda _: found.append(function(*args)), lambda _: "cpu", options(minutes))
        return found[0]

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    failed = None
    with without_collector():
        try:
            found = elastic_launch(config, entry)()
        except ChildFailedError as error:
            failed = error.with_traceback(None)  # it would keep the store
    if failed:
        raise failed
    return [found[rank] for rank in range(count)]
