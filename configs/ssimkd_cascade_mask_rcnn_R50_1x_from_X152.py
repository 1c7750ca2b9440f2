# Cascade Mask R-CNN R50-FPN, 1x, learns from the zoo's Cascade Mask R-CNN X152-FPN (box AP 50.2,
# mask AP 44.0). Its deformable convolutions need Detectron2's compiled operators.
#
#   python train_net.py --num-gpus 8 \
#       --config-file configs/ssimkd_cascade_mask_rcnn_R50_1x_from_X152.py
#
# Cost: 63 GPU-hours for the student alone; the zoo does not say how fast this teacher is
# (README.md). Undistilled: box AP 42.1, mask AP 36.4 (zoo).
from .ssimkd_cascade_mask_rcnn_R50_1x_from_mask_rcnn_X101 import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.distiller.teacher.config = "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml"
train.output_dir = "output/ssimkd_cascade_mask_rcnn_R50_1x_from_X152"
