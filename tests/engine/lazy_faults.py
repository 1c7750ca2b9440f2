"""The LazyConfig of the tests of faults has AdamW, adapters and a loss with weights."""

import torch
from detectron2.config import LazyCall as L
from ssimkd.losses import FGDLoss, SSIMLoss

from .lazy_shapes import dataloader, lr_multiplier, model, train  # noqa: F401
from .lazy_shapes import optimizer as sgd

optimizer = L(torch.optim.AdamW)(params=sgd.params, lr=1e-3)
model.distiller.losses = [L(SSIMLoss)(), L(FGDLoss)()]
model.distiller.adapter = "conv1x1"
dataloader.train.mapper.augmentations[0].update(short_edge_length=[64, 96], sample_style="choice")
