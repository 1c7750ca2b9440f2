# Faster R-CNN R50-FPN, 1x, learns from two of the zoo at once: Faster R-CNN R101-FPN 3x (box AP
# 42.0) and X101-FPN 3x (43.0). Each counts half.
#
#   python train_net.py --num-gpus 8 \
#       --config-file configs/ssimkd_faster_rcnn_R50_1x_from_R101_X101.py
#
# Cost: 42 GPU-hours for the student alone, at most 62 more for the teacher's backbone (README.md).
# Undistilled: box AP 37.9 (zoo).
from detectron2.config import LazyCall as L
from ssimkd import Distiller, Distillers
from ssimkd.losses import SSIMLoss

from .ssimkd_faster_rcnn_R50_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller = L(Distillers)(
    r101=L(Distiller)(
        teacher=dict(config="COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", weights="", opts=[]),
        losses=[L(SSIMLoss)()],
        loss_weight=0.5,
    ),
    x101=L(Distiller)(
        teacher=dict(
            config="COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml", weights="", opts=[]
        ),
        losses=[L(SSIMLoss)()],
        loss_weight=0.5,
    ),
)
train.output_dir = "output/ssimkd_faster_rcnn_R50_1x_from_R101_X101"
