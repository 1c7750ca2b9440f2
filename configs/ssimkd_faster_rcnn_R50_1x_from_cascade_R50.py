# Faster R-CNN R50-FPN, 1x, learns from the zoo's Cascade Mask R-CNN R50-FPN 3x (box AP 44.3).
#
#   python train_net.py --num-gpus 8 \
#       --config-file configs/ssimkd_faster_rcnn_R50_1x_from_cascade_R50.py
#
# Cost: 42 GPU-hours for the student alone, at most 22 more for the teacher's backbone (README.md).
# Undistilled: box AP 37.9 (zoo). The paper, of a Cascade R-CNN X101 that the zoo lacks: 37.4 ->
# 39.8 (as reported, MMDetection).
from .ssimkd_faster_rcnn_R50_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.teacher.config = "Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml"
train.output_dir = "output/ssimkd_faster_rcnn_R50_1x_from_cascade_R50"
