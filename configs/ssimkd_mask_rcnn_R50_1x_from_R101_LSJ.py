# Mask R-CNN R50-FPN, 1x, learns from the zoo's Mask R-CNN R101-FPN trained from scratch for 400
# epochs with large-scale jitter (box AP 48.9, mask AP 43.7), a lazy config.
#
#   python train_net.py --num-gpus 8 \
#       --config-file configs/ssimkd_mask_rcnn_R50_1x_from_R101_LSJ.py
#
# Cost: 52 GPU-hours for the student alone, at most 23 more for the teacher's backbone (README.md).
# Undistilled: box AP 38.6, mask AP 35.2 (zoo).
from .ssimkd_mask_rcnn_R50_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.teacher.config = "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"
train.output_dir = "output/ssimkd_mask_rcnn_R50_1x_from_R101_LSJ"
