#!/usr/bin/env python
"""Trains and evaluates detectors, with distillation or without.

A `.yaml` config runs through Detectron2's DefaultTrainer, a `.py` config through its LazyConfig.

    python train_net.py --config-file configs/ssimkd_R50.yaml --num-gpus 8
    python train_net.py --config-file configs/ssimkd_R50.py --num-gpus 8 train.amp.enabled=True
    python train_net.py --config-file configs/ssimkd_R50.yaml --eval-only MODEL.WEIGHTS x.pth
"""

import sys
from typing import Tuple

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from ssimkd import engine
from ssimkd.cli import check_config, load_config
from ssimkd.errors import exit_in_one_line
from ssimkd.run_record import record_run
from torch.multiprocessing import ProcessExitedException


def splits_of(args) -> Tuple[str, ...]:
    """Whose data a run uses."""
    return ("TEST",) if args.eval_only else ("TRAIN", "TEST")


@exit_in_one_line()
def main(args) -> None:
    """One process of a run."""
    cfg = load_config(args.config_file, args.opts, splits_of(args))
    default_setup(cfg, args)
    lazy = not isinstance(cfg, CfgNode)
    folder = cfg.train.output_dir if lazy else cfg.OUTPUT_DIR
    setup_logger(folder, distributed_rank=comm.get_rank(), name="ssimkd")
    if not lazy:
        run = engine.evaluate if args.eval_only else engine.train
    else:
        run = engine.lazy_evaluate if args.eval_only else engine.lazy_train
    with record_run(folder):
        run(cfg, args.resume)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    with exit_in_one_line():  # before any process is started or folder made
        cfg = load_config(args.config_file, args.opts, splits_of(args))
        check_config(cfg, eval_only=args.eval_only, resume=args.resume, num_gpus=args.num_gpus)
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as error:  # the process has said why
        sys.exit(error.exit_code)
