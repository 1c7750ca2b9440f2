# Faster R-CNN R50-FPN, 1x, learns from the zoo's Faster R-CNN X101-FPN 3x (box AP 43.0).
#
#   python train_net.py --config-file configs/ssimkd_faster_rcnn_R50_1x_from_X101.py --num-gpus 8
#
# Cost: 42 GPU-hours for the student alone, at most 43 more for the teacher's backbone (README.md).
# Undistilled: box AP 37.9 (zoo).
from .ssimkd_faster_rcnn_R50_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.teacher.config = "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml"
train.output_dir = "output/ssimkd_faster_rcnn_R50_1x_from_X101"
