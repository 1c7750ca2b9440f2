"""The processes of a run: torchrun's or Slurm's, or by `--num-gpus` Detectron2's own.

torchrun says in environment variables which of its processes each one is. Slurm's `srun` says the
same under other names; they are read as torchrun's. Everything else is torch.distributed's.
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
    USER_ERRORS,
    WORKER,
    ConfigError,
    describe_error,
    exit_in_one_line,
    one_line,
)
from ssimkd.utils.compat import create_local_process_group

from .preemption import forward_to_children

# What torchrun sets, and torch's "env://" and this file read.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(main: Callable[[Any], None], check: Callable[[Any], str], args: Any) -> None:
    """Runs `main` in every process of a run; an error ends them all and is said once.

    Args:
        main (callable): one process of the run, takes `args`.
        check (callable): takes `args`, raises ConfigError for what cannot run; returns the device.
        args (Namespace): of :func:`ssimkd.cli.argument_parser`.
    """
    with exit_in_one_line(args.debug):
        place = find_place(os.environ)
        if place and args.num_gpus > 1:
            raise ConfigError(
                "--num-gpus: torchrun or srun has started the processes already; leave it out"
            )
        if not place:
            check(args)
            start_processes(main, args)
            return
    os.environ.update(place)
    record(run_process)(main, check, args)  # torchrun shows what is recorded


def start_processes(main: Callable[[Any], None], args: Any) -> None:
    """Detectron2's launch, which starts a process per GPU; ends as the first that failed."""
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
        # a signal leaves no word; a process that has exited has said why
        sys.exit(error.exit_code if error.exit_code > 0 else f"error: {error}")


def run_process(main: Callable[[Any], None], check: Callable[[Any], str], args: Any) -> None:
    """This process's part of a run that torchrun or Slurm has started."""
    timeout = timedelta(minutes=args.timeout)
    with exit_in_one_line(args.debug):
        store = rendezvous(timeout)
    with print_error_once(store, args.debug):
        join(store, check(args), timeout)
        main(args)
        comm.synchronize()  # the main process may be writing still
        dist.destroy_process_group()


def find_place(env: Mapping[str, str]) -> Dict[str, str]:
    """Which process of how many this is.

    Args:
        env (mapping[str, str]): the environment.

    Returns:
        dict[str, str]: torchrun's variables; none where this process was started alone, as is one
        of a shell or batch script of Slurm without srun.

    Raises:
        ConfigError: a variable is missing or no such number, or Slurm has spread the processes in
            a way that Detectron2 does not know.
    """
    if all(name in env for name in VARIABLES):
        place = {name: env[name] for name in VARIABLES}
    elif integer(env, "SLURM_STEP_NUM_TASKS", default="1") > 1:
        place = from_slurm(env)
    else:
        return {}
    for part, whole in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if integer(place, part, least=0) >= integer(place, whole):
            raise ConfigError(f"{part} is {place[part]} and {whole} {place[whole]}: not below it")
    if integer(place, "MASTER_PORT") > 65535:
        raise ConfigError(f"MASTER_PORT is {place['MASTER_PORT']}: there are ports up to 65535")
    return place


def integer(env: Mapping[str, str], name: str, default: str = "", least: int = 1) -> int:
    """The number in a variable; ConfigError where it holds none, or one below the least."""
    value = env.get(name, default)
    if not re.fullmatch(r"[0-9]{1,18}", value) or int(value) < least:
        raise ConfigError(
            f"the environment variable {name} must be an integer of at least {least}, got {value!r}"
        )
    return int(value)


def from_slurm(env: Mapping[str, str]) -> Dict[str, str]:
    """torchrun's variables for one of several tasks of Slurm; see :func:`find_place`."""
    tasks = integer(env, "SLURM_STEP_NUM_TASKS")
    nodes = integer(env, "SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1"))
    rank, local_rank = (integer(env, name, least=0) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    local_size = tasks // nodes
    if tasks % nodes or local_rank != rank % local_size:
        raise ConfigError(
            f"task {rank} of {tasks} is the {local_rank}th of its node, of {nodes} nodes: srun has "
            "to fill one node after the other with equally many; set --ntasks-per-node and "
            "--distribution=block"
        )
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodelist = next((env[name] for name in names if env.get(name)), "127.0.0.1")
    # jobs that share a node stay apart
    port = 20000 + integer(env, "SLURM_JOB_ID", "0", least=0) % 10000
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": env.get("MASTER_ADDR", first_host(nodelist)),
        "MASTER_PORT": env.get("MASTER_PORT", str(port)),
    }


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: "gpu[007-009,12]-ib,login" is gpu007-ib."""
    first = re.match(r"(\[.*?\]|[^,\[])*", nodelist)
    return re.sub(r"\[(\w+).*?\]", r"\1", first.group() if first else nodelist)


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
def print_error_once(store: dist.Store, debug: bool) -> Iterator[None]:
    """As :func:`exit_in_one_line`, silent where another process has said the same."""
    try:
        yield
    except USER_ERRORS as error:
        if debug:
            raise
        said = describe_error(error)
        try:
            # the images that follow it are each process's own
            first = store.add("error/" + said.split(" (iteration ")[0], 1) == 1
        except RuntimeError:  # the store is gone, with the process that kept it
            first = True
        sys.exit(f"error: {said}" if first else 1)


def join(store: dist.Store, device: str, timeout: timedelta) -> None:
    """Makes this process one of torch.distributed's and Detectron2's.

    Args:
        store (Store): of :func:`meet`.
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
        # Slurm's --gpus-per-task shows each process its own GPU alone
        torch.cuda.set_device(local_rank if gpus >= local_size else 0)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
    )
    create_local_process_group(local_size)
    comm.synchronize()
