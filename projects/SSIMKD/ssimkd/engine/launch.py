"""The processes of a run: torchrun's, or by `--num-gpus` Detectron2's own.

torchrun says in environment variables which of its processes each one is. On a cluster, Slurm's
`srun --ntasks-per-node 1` starts one torchrun on each machine. The rest is torch.distributed's.
"""

import os
import re
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, Dict, Iterator, Mapping

import torch
import torch.distributed as dist
from detectron2 import engine
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ssimkd.errors import (
    IN_LOG,
    WORKER,
    ConfigError,
    describe_error,
    exit_in_one_line,
    is_user_error,
    one_line,
)
from ssimkd.utils.compat import create_local_process_group

from .preemption import forward_to_children

# What torchrun sets, and torch's "env://" and this file read.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(main: Callable[[Any], None], check: Callable[[Any], str], args: Any) -> None:
    """Runs `main` in every process of a run. An error ends all of them and is printed once.

    Args:
        main (callable): one process of the run, takes `args`.
        check (callable): takes `args`, raises ConfigError for what cannot run; returns the device.
        args (Namespace): of :func:`argument_parser`.
    """
    with exit_in_one_line():
        place = find_place(os.environ)
        if place and args.num_gpus > 1:
            raise ConfigError(
                "--num-gpus: torchrun has started the processes already; leave it out"
            )
        if not place:
            check(args)
            start_processes(main, args)
            return
    os.environ.update(place)
    record(run_process)(main, check, args)  # torchrun shows what is recorded


def start_processes(main: Callable[[Any], None], args: Any) -> None:
    """Starts a process for each GPU by Detectron2's launch. Ends as the first that failed."""
    if args.num_gpus > 1:
        forward_to_children()
    try:
        engine.launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
            timeout=timedelta(minutes=args.timeout),
        )
    except ProcessRaisedException as error:  # its message is the traceback
        last = str(error).rstrip().splitlines()[-1]
        if WORKER.match(last):
            raise ConfigError(WORKER.sub("", last)) from None
        raise
    except ProcessExitedException as error:
        # a process that a signal has ended printed nothing; any other has printed its error
        sys.exit(error.exit_code if error.exit_code > 0 else f"error: {error}")


def run_process(main: Callable[[Any], None], check: Callable[[Any], str], args: Any) -> None:
    """This process's part of a run that torchrun has started."""
    timeout = timedelta(minutes=args.timeout)
    with exit_in_one_line():
        store = rendezvous(timeout)
    with print_error_once(store):
        join_group(store, check(args), timeout)
        main(args)
        comm.synchronize()  # the main process may be writing still
        dist.destroy_process_group()


def find_place(env: Mapping[str, str]) -> Dict[str, str]:
    """Which process of how many this is.

    Args:
        env (mapping[str, str]): the environment.

    Returns:
        dict[str, str]: torchrun's variables; none where this process was started alone.

    Raises:
        ConfigError: a variable is no such number.
    """
    if not all(name in env for name in VARIABLES):
        return {}
    place = {name: env[name] for name in VARIABLES}
    for part, whole in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if integer(place, part, least=0) >= integer(place, whole):
            raise ConfigError(f"{part} is {place[part]} and {whole} {place[whole]}: not below it")
    if integer(place, "MASTER_PORT") > 65535:
        raise ConfigError(f"MASTER_PORT is {place['MASTER_PORT']}: there are ports up to 65535")
    return place


def integer(env: Mapping[str, str], name: str, least: int = 1) -> int:
    """The number in a variable; ConfigError where it holds none, or one below the least."""
    value = env[name]
    if not re.fullmatch(r"[0-9]{1,18}", value) or int(value) < least:
        raise ConfigError(
            f"the environment variable {name} must be an integer of at least {least}, got {value!r}"
        )
    return int(value)


def rendezvous(timeout: timedelta) -> dist.Store:
    """Waits for the other processes; returns the store that they share.

    Raises:
        ConfigError: they did not come.
    """
    rank, size, _, _, host, port = (os.environ[name] for name in VARIABLES)
    if rank == "0":
        print(f"waiting at {host}:{port} for the {size} processes of this run", file=sys.stderr)
    try:
        return next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"process {rank} of {size} did not meet the others at {host}:{port} (MASTER_ADDR, "
            f"MASTER_PORT) in time: {one_line(error)}"
        ) from error


@contextmanager
def print_error_once(store: dist.Store) -> Iterator[None]:
    """As :func:`exit_in_one_line`, but prints nothing that another process has printed."""
    try:
        yield
    except Exception as error:
        if not is_user_error(error):
            raise
        said = describe_error(error)
        try:
            # the images and the log that follow it are each process's own
            key = said.split(" (iteration ")[0].split(IN_LOG)[0]
            first = store.add(f"error/{key}", 1) == 1
        except RuntimeError:  # the store is gone, with the process that kept it
            first = True
        sys.exit(f"error: {said}" if first else 1)


def join_group(store: dist.Store, device: str, timeout: timedelta) -> None:
    """Makes this process one of torch.distributed's and Detectron2's.

    Args:
        store (Store): of :func:`rendezvous`.
        device (str): "cuda": NCCL and a GPU of its own; else gloo.
        timeout (timedelta): of every collective operation.

    Raises:
        ConfigError: the machine has fewer GPUs than processes.
    """
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in VARIABLES[:4])
    on_gpu = device.startswith("cuda")
    if on_gpu:
        gpus = torch.cuda.device_count()
        if 1 < gpus < local_size:
            raise ConfigError(f"{local_size} processes share this machine, which has {gpus} GPUs")
        # a cluster may show each process its own GPU alone
        torch.cuda.set_device(local_rank if gpus >= local_size else 0)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
    )
    create_local_process_group(local_size)
    comm.synchronize()
