#!/usr/bin/env python
"""Trains and evaluates detectors, with distillation or without.

A `.yaml` config runs through Detectron2's DefaultTrainer, a `.py` config through its LazyConfig.

    python train_net.py --config-file configs/ssimkd_R50.yaml --num-gpus 8
    python train_net.py --config-file configs/ssimkd_R50.py --num-gpus 8 train.amp.enabled=True
    python train_net.py --config-file configs/ssimkd_R50.yaml --eval-only MODEL.WEIGHTS x.pth
    torchrun --nproc-per-node 8 train_net.py --config-file configs/ssimkd_R50.yaml
    srun --ntasks-per-node 8 python train_net.py --config-file configs/ssimkd_R50.yaml
"""

from typing import Optional, Sequence

import ssimkd  # noqa: F401 (first: it silences warnings of other packages)
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from ssimkd import engine, launch, lazy_engine
from ssimkd.checkpoint_file import trust_checkpoints
from ssimkd.cli import argument_parser, check_config, load_arguments
from ssimkd.errors import naming, traceback_in_log_only
from ssimkd.run_record import record_run
from ssimkd.settings import key_of, setting
from ssimkd.writers import quiet_terminal


def main(args) -> None:
    """One process of a run."""
    cfg = load_arguments(args)
    trust_checkpoints(args.trust_checkpoint)
    folder = setting(cfg, "output")
    with naming(f"{key_of(cfg, 'output')}: cannot write to {folder}", OSError):
        if args.quiet:
            quiet_terminal(folder, comm.get_rank())
        default_setup(cfg, args)
    setup_logger(folder, distributed_rank=comm.get_rank(), name="ssimkd")
    if isinstance(cfg, CfgNode):
        run = engine.evaluate if args.eval_only else engine.train
    else:
        run = lazy_engine.lazy_evaluate if args.eval_only else lazy_engine.lazy_train
    with record_run(folder), traceback_in_log_only(args.debug):
        run(cfg, args.resume)


def check(args) -> str:
    """Raises ConfigError for what cannot run, before any folder is made; returns the device."""
    return check_config(load_arguments(args), args)


def run(words: Optional[Sequence[str]] = None) -> None:
    """The command; `words` are its arguments, by default the process's own."""
    launch.start(main, check, argument_parser().parse_args(words))


if __name__ == "__main__":
    run()
