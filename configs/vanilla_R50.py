# The student of ssimkd_R50 without a teacher: the zoo's faster_rcnn_R_50_FPN_1x.
#
#   python train_net.py --config-file configs/vanilla_R50.py --num-gpus 8
#
# Cost: 42 GPU-hours, estimated.
# Expected: 37.9 box AP (zoo).
from .ssimkd_R50 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.losses = []
train.output_dir = "output/vanilla_R50"
