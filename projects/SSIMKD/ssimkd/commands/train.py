"""Trains and evaluates detectors, with distillation or without.

A `.yaml` config runs through Detectron2's DefaultTrainer, a `.py` config through its LazyConfig.

    python train_net.py --config-file configs/ssimkd_R50.yaml --num-gpus 8
    python train_net.py --config-file configs/ssimkd_R50.py --num-gpus 8 train.amp.enabled=True
    python train_net.py --config-file configs/ssimkd_R50.yaml --eval-only MODEL.WEIGHTS x.pth
    torchrun --nproc-per-node 8 train_net.py --config-file configs/ssimkd_R50.yaml
    srun --ntasks-per-node 8 python train_net.py --config-file configs/ssimkd_R50.yaml
"""

from typing import Optional, Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import ssimkd  # noqa: F401 (first: it silences warnings of other packages)
from ssimkd.engine import launch
from ssimkd.engine import lazy_driver as lazy_engine
from ssimkd.engine import yaml_driver as engine
from ssimkd.engine.arguments import argument_parser, check_config, load_arguments
from ssimkd.engine.run_record import record_run
from ssimkd.engine.writers import quiet_terminal
from ssimkd.errors import as_config_error, traceback_in_log_only
from ssimkd.utils.config_keys import key_of, setting


def run(args) -> None:
    """One process of a run."""
    cfg = load_arguments(args)
    folder = setting(cfg, "output")
    with as_config_error(f"{key_of(cfg, 'output')}: cannot write to {folder}", OSError):
        if args.quiet:
            quiet_terminal(folder, comm.get_rank())
        default_setup(cfg, args)
    setup_logger(folder, distributed_rank=comm.get_rank(), name="ssimkd")
    if isinstance(cfg, CfgNode):
        drive = engine.evaluate if args.eval_only else engine.train
    else:
        drive = lazy_engine.lazy_evaluate if args.eval_only else lazy_engine.lazy_train
    with record_run(folder), traceback_in_log_only(args.debug):
        drive(cfg, args.resume)


def check(args) -> str:
    """Raises ConfigError for what cannot run, before any folder is made; returns the device."""
    return check_config(load_arguments(args), args)


def main(words: Optional[Sequence[str]] = None) -> None:
    """The command; `words` are its arguments, by default the process's own."""
    launch.start(run, check, argument_parser().parse_args(words))
