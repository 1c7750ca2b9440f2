# ssimkd_retinanet_R50_1x_from_R101 with the pixel-wise l1 loss instead of SSIM, on maps normalised
# in the same way.
#
#   python train_net.py --config-file configs/l1kd_retinanet_R50_1x_from_R101.py --num-gpus 8
#
# Cost: 41 GPU-hours for the student alone, at most 20 more for the teacher's backbone (README.md).
# Undistilled: box AP 37.4 (zoo). The paper, of such a pair: 36.4 -> 38.7 (as reported,
# MMDetection).
from detectron2.config import LazyCall as L
from ssimkd.losses import L1Loss

from .ssimkd_retinanet_R50_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.losses = [L(L1Loss)()]
train.output_dir = "output/l1kd_retinanet_R50_1x_from_R101"
