"""The LazyConfig of the tests of faults: AdamW, adapters, a trained loss, two kinds of images."""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from ssimkd.losses import FGDLoss, SSIMLoss

from .lazy_shapes import dataloader, lr_multiplier, model, train  # noqa: F401
from .lazy_shapes import optimizer as sgd

optimizer = L(torch.optim.AdamW)(params=sgd.params, lr=1e-3)
model.distiller.losses = [L(SSIMLoss)(), L(FGDLoss)()]
model.distiller.adapter = "conv1x1"
dataloader.unlabeled = L(build_detection_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names="ssimkd_shapes_train", filter_empty=False),
    mapper=dataloader.train.mapper,
    total_batch_size=1,
    num_workers=0,
)
dataloader.train.mapper.augmentations[0].update(short_edge_length=[64, 96], sample_style="choice")
