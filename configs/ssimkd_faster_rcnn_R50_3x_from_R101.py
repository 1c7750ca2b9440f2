# Faster R-CNN R50-FPN, 3x, learns from the zoo's Faster R-CNN R101-FPN 3x (box AP 42.0).
#
#   python train_net.py --config-file configs/ssimkd_faster_rcnn_R50_3x_from_R101.py --num-gpus 8
#
# Cost: 125 GPU-hours for the student alone, at most 58 more for the teacher's backbone (README.md).
# Undistilled: box AP 40.2 (zoo).
from ssimkd.utils.compat import model_zoo

from .ssimkd_faster_rcnn_R50_1x_from_R101 import dataloader, model, optimizer, train  # noqa: F401

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
train.max_iter = 270_000
train.output_dir = "output/ssimkd_faster_rcnn_R50_3x_from_R101"
