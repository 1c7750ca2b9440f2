# RetinaNet R50-FPN, 2x, learns from the zoo's RetinaNet R101-FPN 3x (box AP 40.4).
#
#   python train_net.py --config-file configs/ssimkd_retinanet_R50_2x_from_R101.py --num-gpus 8
#
# Cost: 82 GPU-hours for the student alone, at most 39 more for the teacher's backbone (README.md).
# The zoo has no 2x. The paper at 2x: 37.4 -> 40.6 (as reported, MMDetection). FGD, R101 -> R50 at
# 2x: 37.4 -> 39.6 (its authors, MMDetection).
from ssimkd.utils.compat import model_zoo

from .ssimkd_retinanet_R50_1x_from_R101 import dataloader, model, optimizer, train  # noqa: F401

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_2x
train.max_iter = 180_000
train.output_dir = "output/ssimkd_retinanet_R50_2x_from_R101"
