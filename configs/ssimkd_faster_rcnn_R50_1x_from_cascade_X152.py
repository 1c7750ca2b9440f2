# Faster R-CNN R50-FPN, 1x, learns from the zoo's Cascade Mask R-CNN X152-FPN (box AP 50.2). Its
# deformable convolutions need Detectron2's compiled operators.
#
#   python train_net.py --num-gpus 8 \
#       --config-file configs/ssimkd_faster_rcnn_R50_1x_from_cascade_X152.py
#
# Cost: 42 GPU-hours for the student alone; the zoo does not say how fast this teacher is
# (README.md). Undistilled: box AP 37.9 (zoo).
from .ssimkd_faster_rcnn_R50_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.teacher.config = "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml"
train.output_dir = "output/ssimkd_faster_rcnn_R50_1x_from_cascade_X152"
