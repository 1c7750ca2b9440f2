# Faster R-CNN R50-FPN, 1x, learns from the zoo's Faster R-CNN R101-FPN 3x (box AP 42.0): ssimkd_R50
# by the name that the other experiments are named by.
#
#   python train_net.py --config-file configs/ssimkd_faster_rcnn_R50_1x_from_R101.py --num-gpus 8
#
# Cost: 42 GPU-hours for the student alone, at most 20 more for the teacher's backbone (README.md).
# Undistilled: box AP 37.9 (zoo). DSIG, of an R101: 40.57 (its authors, Detectron2, as long as 1x).
from .ssimkd_R50 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

train.output_dir = "output/ssimkd_faster_rcnn_R50_1x_from_R101"
