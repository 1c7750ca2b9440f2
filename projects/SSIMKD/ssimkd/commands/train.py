"""Trains and evaluates detectors, with distillation or without.

A `.yaml` config runs through Detectron2's DefaultTrainer, a `.py` config through its LazyConfig.

    python train_net.py --config-file configs/ssimkd_R50.yaml --num-gpus 8
    python train_net.py --config-file configs/ssimkd_R50.py --num-gpus 8 train.amp.enabled=True
    python train_net.py --config-file configs/ssimkd_R50.yaml --eval-only MODEL.WEIGHTS x.pth
    torchrun --nproc-per-node 8 train_net.py --config-file configs/ssimkd_R50.yaml
    srun --ntasks-per-node 1 torchrun --nnodes 2 --nproc-per-node 8 ... train_net.py ...
"""

import sys
from contextlib import nullcontext
from typing import Optional, Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from ssimkd_cli import parse

from ssimkd.engine import launch
from ssimkd.engine.arguments import add_data, check_config, load_arguments, read_arguments
from ssimkd.engine.driver import driver_of
from ssimkd.engine.preemption import INTERRUPTED
from ssimkd.engine.run_record import STOPPED, keep_config, record_run
from ssimkd.engine.writers import quiet_terminal
from ssimkd.engine.yaml_driver import DistillTrainer
from ssimkd.errors import as_config_error, traceback_in_log
from ssimkd.utils.config_files import find_config
from ssimkd.utils.config_keys import key_of, names_of, setting
from ssimkd.utils.known_warnings import silence_known_warnings
from ssimkd.utils.log_files import without_warnings


def run(args) -> None:
    """One process of a run."""
    try:
        _run(args)
    except KeyboardInterrupt:  # torch would end a process that it has started with status 0
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if end.code in STOPPED:
            comm.synchronize()  # torch ends all other processes as soon as one has ended
        raise


def _run(args) -> None:
    silence_known_warnings()
    cfg = read_arguments(args)
    args.config_file = find_config(args.config_file)  # Detectron2 prints the file
    folder = setting(cfg, "output")
    unwritable = f"{key_of(cfg, 'output')}: cannot write to {folder}"
    quiet = quiet_terminal(folder, comm.get_rank()) if args.quiet else nullcontext()
    with quiet, keep_config(folder, args.eval_only):
        with as_config_error(unwritable, OSError):
            setup_logger(folder, distributed_rank=comm.get_rank(), name="ssimkd")
            setup_logger(folder, distributed_rank=comm.get_rank())  # as default_setup calls it
        cfg = add_data(cfg, args)  # log.txt gets its warnings
        if isinstance(cfg, CfgNode) and not args.eval_only:  # config.yaml is that of the run
            cfg = DistillTrainer.auto_scale_workers(cfg, comm.get_world_size())
        with as_config_error(unwritable, OSError):
            default_setup(cfg, args)
        with record_run(folder, names_of(cfg, "TEST"), args.eval_only), traceback_in_log():
            drive(cfg, args)


def drive(cfg, args) -> None:
    """Trains or evaluates by the driver of this kind of config."""
    driver = driver_of(cfg)
    if args.eval_only:
        driver.evaluate(cfg, args.resume)
    else:
        driver.train(cfg, args.resume)


def check(args) -> str:
    """Raises ConfigError for what cannot run, before any folder is made; returns the device."""
    with without_warnings("ssimkd"):  # the run logs them
        return check_config(load_arguments(args), args)


def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    launch.start(run, check, parse("train", words))
