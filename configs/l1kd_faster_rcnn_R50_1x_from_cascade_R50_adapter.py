# ssimkd_faster_rcnn_R50_1x_from_cascade_R50_adapter with the pixel-wise l1 loss instead of SSIM, on
# maps normalised in the same way.
#
#   python train_net.py --num-gpus 8 \
#       --config-file configs/l1kd_faster_rcnn_R50_1x_from_cascade_R50_adapter.py
#
# Cost: 42 GPU-hours for the student alone, at most 22 more for the teacher's backbone (README.md).
# Undistilled: box AP 37.9 (zoo). The paper, of a Cascade R-CNN X101 that the zoo lacks: 37.4 ->
# about 38.6 (as reported, MMDetection).
from detectron2.config import LazyCall as L
from ssimkd.losses import L1Loss

from .ssimkd_faster_rcnn_R50_1x_from_cascade_R50_adapter import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.distiller.losses = [L(L1Loss)()]
train.output_dir = "output/l1kd_faster_rcnn_R50_1x_from_cascade_R50_adapter"
