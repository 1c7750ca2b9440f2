# ssimkd_R50 with the pixel-wise l1 loss instead of SSIM, on maps normalised in the same way.
#
#   python train_net.py --config-file configs/l1kd_R50.py --num-gpus 8
from detectron2.config import LazyCall as L
from ssimkd.losses import L1Loss

from .ssimkd_R50 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.losses = [L(L1Loss)()]
train.output_dir = "output/l1kd_R50"
