"""Starts the processes of a run, or joins the processes that torchrun has started.

Detectron2 starts the processes of `--num-gpus`. torchrun tells each of its processes by environment
variables which one it is. On a cluster, `srun --ntasks-per-node 1` starts a torchrun per machine.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, Iterator, Mapping

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

# torchrun sets these environment variables.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(main: Callable[[Any], None], check: Callable[[Any], str], args: Any) -> None:
    """Runs `main` in every process of a run. An error ends all processes and is printed once.

    Args:
        main (callable): takes `args`; the work of one process.
        check (callable): takes `args`, returns the device; raises ConfigError for a wrong setting.
        args (Namespace): of `ssimkd train`.
    """
    with exit_in_one_line():
        if not started_by_torchrun(os.environ):
            check(args)
            start_processes(main, args)
            return
        if args.num_gpus > 1:
            raise ConfigError(
                "--num-gpus: torchrun has started the processes already; leave it out"
            )
    record(run_process)(main, check, args)  # torchrun prints the exception that is recorded


def start_processes(main: Callable[[Any], None], args: Any) -> None:
    """Starts a process for each GPU. Exits with the status of the first one that fails."""
    if args.num_gpus * args.num_machines > 1:  # Detectron2 then starts processes
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
    except ProcessRaisedException as error:  # its message is the process's traceback
        last = str(error).rstrip().splitlines()[-1]
        if WORKER.match(last):
            raise ConfigError(WORKER.sub("", last)) from None
        raise
    except ProcessExitedException as error:
        # a process that a signal has ended printed nothing; any other process printed its error
        sys.exit(error.exit_code if error.exit_code > 0 else f"error: {error}")


def run_process(main: Callable[[Any], None], check: Callable[[Any], str], args: Any) -> None:
    """Joins the run that torchrun has started, and does this process's work."""
    timeout = timedelta(minutes=args.timeout)
    with exit_in_one_line():
        store = rendezvous(timeout)
    with print_error_once(store):
        join_group(store, check(args), timeout)
        main(args)
        comm.synchronize()  # the main process may still be writing files
        dist.destroy_process_group()


def started_by_torchrun(env: Mapping[str, str]) -> bool:
    """Whether torchrun started this process; another program may set a single variable."""
    return all(name in env for name in VARIABLES)


def rendezvous(timeout: timedelta) -> dist.Store:
    """Waits for the other processes; returns the key-value store that all of them share.

    Raises:
        ConfigError: a process did not connect in time.
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
    """Does as :func:`exit_in_one_line`, but prints no line that another process has printed."""
    try:
        yield
    except Exception as error:
        if not is_user_error(error):
            raise
        said = describe_error(error)
        try:
            # what follows the iteration or the log differs between processes
            key = said.split(" (iteration ")[0].split(IN_LOG)[0]
            first = store.add(f"error/{key}", 1) == 1
        except RuntimeError:  # the process that kept the store has ended
            first = True
        sys.exit(f"error: {said}" if first else 1)


def join_group(store: dist.Store, device: str, timeout: timedelta) -> None:
    """Makes this process a member of the process groups of torch.distributed and Detectron2.

    Args:
        store (Store): of :func:`rendezvous`.
        device (str): "cuda" selects NCCL and a GPU for this process; any other selects gloo.
        timeout (timedelta): limit of every collective operation.

    Raises:
        ConfigError: processes outnumber the GPUs that they see.
    """
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in VARIABLES[:4])
    on_gpu = device.startswith("cuda")
    if on_gpu:
        gpus = torch.cuda.device_count()
        if 1 < gpus < local_size:
            raise ConfigError(f"{local_size} processes share this machine, which has {gpus} GPUs")
        # on some clusters each process sees only its own GPU
        torch.cuda.set_device(local_rank if gpus >= local_size else 0)
        own = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        if store.add(f"gpu/{own}", 1) > 1:
            raise ConfigError(
                f"{local_size} processes share this machine, and two of them see only the same "
                "GPU: start one process for each GPU (--nproc-per-node)"
            )
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
    )
    create_local_process_group(local_size)
    comm.synchronize()
