# ssimkd_R50 with the pixel-wise l2 loss instead of SSIM, on maps normalised in the same way.
#
#   python train_net.py --config-file configs/l2kd_R50.py --num-gpus 8
from detectron2.config import LazyCall as L
from ssimkd.losses import L2Loss

from .ssimkd_R50 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.losses = [L(L2Loss)()]
train.output_dir = "output/l2kd_R50"
