# ssimkd_faster_rcnn_R50_1x_from_R101 whose neck and heads start from the teacher's weights: ICD's
# protocol (Kang et al., NeurIPS 2021).
#
#   python train_net.py --num-gpus 8 \
#       --config-file configs/ssimkd_faster_rcnn_R50_1x_from_R101_inherit.py
#
# Cost: 42 GPU-hours for the student alone, at most 20 more for the teacher's backbone (README.md).
# Undistilled: box AP 37.9 (zoo). ICD: 40.9 (its authors, Detectron2).
from .ssimkd_faster_rcnn_R50_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.inherit = ["neck", "proposal_generator", "roi_heads"]
train.output_dir = "output/ssimkd_faster_rcnn_R50_1x_from_R101_inherit"
