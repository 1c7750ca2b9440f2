# RetinaNet R50-FPN, 3x, learns from the zoo's RetinaNet R101-FPN 3x (box AP 40.4).
#
#   python train_net.py --config-file configs/ssimkd_retinanet_R50_3x_from_R101.py --num-gpus 8
#
# Cost: 123 GPU-hours for the student alone, at most 59 more for the teacher's backbone (README.md).
# Undistilled: box AP 38.7 (zoo).
from ssimkd.utils.compat import model_zoo

from .ssimkd_retinanet_R50_1x_from_R101 import dataloader, model, optimizer, train  # noqa: F401

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
train.max_iter = 270_000
train.output_dir = "output/ssimkd_retinanet_R50_3x_from_R101"
