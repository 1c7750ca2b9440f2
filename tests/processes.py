"""Runs a function in several processes. They are forked, so they need not import again."""

import gc
import signal
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
    """The arguments that `launch.start` reads."""
    return Namespace(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto", timeout=minutes)


def free_port():
    """A port of this machine that is not in use."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


@contextmanager
def signal_handlers():
    """Restores the handlers of the signals that torchrun replaces."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def without_collector():
    """Stops garbage collection while processes are forked, and collects afterwards.

    A child that collects a store of its parent would wait forever for the store's thread, which a
    fork does not copy.
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
        ProcessExitedException, ProcessRaisedException: a process has failed.
    """
    with without_collector():
        mp.start_processes(function, args=args, nprocs=count, start_method="fork")


def in_processes(count, function, *args, minutes=1.0):
    """What `function(*args)` returns in each of `count` processes of `ssimkd.launch`, by rank.

    Args:
        minutes (float): limit of each collective operation.

    Raises:
        ChildFailedError: a process has failed.
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
    with without_collector(), signal_handlers():
        try:
            found = elastic_launch(config, entry)()
        except ChildFailedError as error:
            failed = error.with_traceback(None)  # the traceback would keep the store alive
    if failed:
        raise failed
    return [found[rank] for rank in range(count)]
