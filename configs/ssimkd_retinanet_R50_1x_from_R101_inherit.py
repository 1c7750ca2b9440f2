# ssimkd_retinanet_R50_1x_from_R101 whose neck and head start from the teacher's weights: ICD's
# protocol (Kang et al., NeurIPS 2021).
#
#   python train_net.py --num-gpus 8 \
#       --config-file configs/ssimkd_retinanet_R50_1x_from_R101_inherit.py
#
# Cost: 41 GPU-hours for the student alone, at most 20 more for the teacher's backbone (README.md).
# Undistilled: box AP 37.4 (zoo). ICD: 40.7 (its authors, Detectron2).
from .ssimkd_retinanet_R50_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.inherit = ["neck", "head"]
train.output_dir = "output/ssimkd_retinanet_R50_1x_from_R101_inherit"
