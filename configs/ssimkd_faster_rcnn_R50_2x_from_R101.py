# Faster R-CNN R50-FPN, 2x, learns from the zoo's Faster R-CNN R101-FPN 3x (box AP 42.0).
#
#   python train_net.py --config-file configs/ssimkd_faster_rcnn_R50_2x_from_R101.py --num-gpus 8
#
# Cost: 84 GPU-hours for the student alone, at most 39 more for the teacher's backbone (README.md).
# The zoo has no 2x. In MMDetection, R101 -> R50 at 2x: 38.4 undistilled, FGD 40.4 (its authors),
# PKD 40.3 (its authors).
from ssimkd.utils.compat import model_zoo

from .ssimkd_faster_rcnn_R50_1x_from_R101 import dataloader, model, optimizer, train  # noqa: F401

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
train.max_iter = 180_000
train.output_dir = "output/ssimkd_faster_rcnn_R50_2x_from_R101"
