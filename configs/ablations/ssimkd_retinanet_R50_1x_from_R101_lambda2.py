# ssimkd_retinanet_R50_1x_from_R101 with a weight of 2 instead of 4.
#
#   python train_net.py --num-gpus 8 \
#       --config-file configs/ablations/ssimkd_retinanet_R50_1x_from_R101_lambda2.py
#
# Cost: 41 GPU-hours for the student alone, at most 20 more for the teacher's backbone (README.md).
# Undistilled: box AP 37.4 (zoo).
from ..ssimkd_retinanet_R50_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.losses[0].weight = 2.0
train.output_dir = "output/ssimkd_retinanet_R50_1x_from_R101_lambda2"
