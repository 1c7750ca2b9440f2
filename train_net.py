#!/usr/bin/env python
"""Trains and evaluates detectors, with distillation or without: `ssimkd train`.

A `.yaml` config runs through Detectron2's DefaultTrainer, a `.py` config through its LazyConfig.

    python train_net.py --config-file configs/ssimkd_R50.yaml --num-gpus 8
    python train_net.py --config-file configs/ssimkd_R50.py --num-gpus 8 train.amp.enabled=True
    python train_net.py --config-file configs/ssimkd_R50.yaml --eval-only MODEL.WEIGHTS x.pth
    torchrun --nproc-per-node 8 train_net.py --config-file configs/ssimkd_R50.yaml
"""

import sys

from ssimkd_cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
