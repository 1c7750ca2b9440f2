# Faster R-CNN R50-FPN learns from the zoo's Faster R-CNN R101-FPN 3x, which has 42.0 box AP.
#
#   python train_net.py --config-file configs/ssimkd_R50.py --num-gpus 8
#
# Cost: 42 GPU-hours for the student and at most 20 more for the teacher, estimated.
# Expected: without a teacher this student has 37.9 box AP (zoo).
from detectron2.config import LazyCall as L
from ssimkd import Distiller, DistillRCNN
from ssimkd.losses import SSIMLoss
from ssimkd.utils.compat import model_zoo

optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
train = model_zoo.get_config("common/train.py").train
model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model

# The zoo's common models have no Faster R-CNN; it is Mask R-CNN without its mask branch.
for mask_part in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(mask_part)
dataloader.train.mapper.use_instance_mask = False
model.backbone.bottom_up.freeze_at = 2

model._target_ = DistillRCNN
model.distiller = L(Distiller)(
    teacher=dict(config="COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", weights="", opts=[]),
    losses=[L(SSIMLoss)()],
)

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/ssimkd_R50"
