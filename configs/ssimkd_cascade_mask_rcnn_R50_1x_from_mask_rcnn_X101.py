# Cascade Mask R-CNN R50-FPN, 1x, learns from the zoo's Mask R-CNN X101-FPN 3x (box AP 44.3, mask AP
# 39.5).
#
#   python train_net.py --num-gpus 8 \
#       --config-file configs/ssimkd_cascade_mask_rcnn_R50_1x_from_mask_rcnn_X101.py
#
# Cost: 63 GPU-hours for the student alone, at most 46 more for the teacher's backbone (README.md).
# Undistilled: box AP 42.1, mask AP 36.4 (zoo).
from detectron2.config import LazyCall as L
from ssimkd import Distiller, DistillRCNN
from ssimkd.losses import SSIMLoss
from ssimkd.utils.compat import model_zoo

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader, lr_multiplier = _zoo.dataloader, _zoo.lr_multiplier
optimizer, train = _zoo.optimizer, _zoo.train

# The zoo has no lazy Cascade Mask R-CNN, but its model; proposals as in the zoo's .yaml.
model = model_zoo.get_config("common/models/cascade_rcnn.py").model
model.backbone.bottom_up.freeze_at = 2
model.proposal_generator.post_nms_topk = (2000, 1000)

model._target_ = DistillRCNN
model.distiller = L(Distiller)(
    teacher=dict(
        config="COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml", weights="", opts=[]
    ),
    losses=[L(SSIMLoss)()],
)

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/ssimkd_cascade_mask_rcnn_R50_1x_from_mask_rcnn_X101"
