#!/usr/bin/env python
"""Trains and evaluates detectors, with distillation or without.

A `.yaml` config runs through Detectron2's DefaultTrainer, a `.py` config through its LazyConfig.

    python train_net.py --config-file configs/ssimkd_R50.yaml --num-gpus 8
    python train_net.py --config-file configs/ssimkd_R50.py --num-gpus 8 train.amp.enabled=True
    python train_net.py --config-file configs/ssimkd_R50.yaml --eval-only MODEL.WEIGHTS x.pth
"""

import os
import sys

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch

try:
    from ssimkd import ConfigError, add_ssimkd_config, engine
except ModuleNotFoundError:  # not installed: it lies beside this file
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "projects", "SSIMKD"))
    from ssimkd import ConfigError, add_ssimkd_config, engine
from ssimkd.data import check_datasets
from ssimkd.teacher import one_line


def load_config(args):
    """The config of the command line: a CfgNode (`.yaml`) or a DictConfig (`.py`).

    Raises:
        ConfigError: it cannot be read, or an override does not apply.
    """
    if not args.config_file:
        raise ConfigError("--config-file is missing, for example --config-file configs/ssimkd_R50.yaml")
    try:
        if args.config_file.endswith(".py"):
            return LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
        cfg = get_cfg()
        add_ssimkd_config(cfg)
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
        cfg.freeze()
        return cfg
    except Exception as error:
        overrides = f" with {' '.join(args.opts)}" if args.opts else ""
        raise ConfigError(f"{args.config_file}{overrides}: {one_line(error)}") from error


def check_config(cfg, args) -> None:
    """Raises ConfigError for what would fail later and less clearly: data and devices."""
    if isinstance(cfg, CfgNode):
        used = {"DATASETS.TEST": cfg.DATASETS.TEST, "DATASETS.TRAIN": cfg.DATASETS.TRAIN}
        device, key = cfg.MODEL.DEVICE, "MODEL.DEVICE cpu"
    else:
        used = {f"dataloader.{k}.dataset.names": cfg.dataloader[k].dataset.names for k in ("test", "train")}
        device, key = cfg.train.device, "train.device=cpu"
    for name, datasets in list(used.items())[: 1 if args.eval_only else 2]:
        check_datasets([datasets] if isinstance(datasets, str) else datasets, name)
    gpus = torch.cuda.device_count()
    if device.startswith("cuda") and args.num_gpus > gpus:
        raise ConfigError(f"--num-gpus is {args.num_gpus}, this machine has {gpus}; without any: {key}")


def run(args):
    """One process of a run; returns the metrics of its last evaluation."""
    cfg = load_config(args)
    check_config(cfg, args)
    default_setup(cfg, args)
    lazy = not isinstance(cfg, CfgNode)
    if args.eval_only:
        return (engine.lazy_evaluate if lazy else engine.evaluate)(cfg, args.resume)
    return (engine.lazy_train if lazy else engine.train)(cfg, args.resume)


def main(args) -> None:
    """Like :func:`run`; what a user can mend ends in one line and exit status 1."""
    try:
        run(args)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
