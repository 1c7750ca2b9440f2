# Mask R-CNN R50-FPN learns from the zoo's Mask R-CNN R101-FPN 3x, which has 42.9 box AP and
# 38.6 mask AP.
#
#   python train_net.py --config-file configs/ssimkd_mask_rcnn_R50.py --num-gpus 8
#
# Cost: 52 GPU-hours for the student and at most 23 more for the teacher, estimated.
# Expected: without a teacher this student has 38.6 box AP and 35.2 mask AP (zoo).
from detectron2.config import LazyCall as L
from ssimkd import Distiller, DistillRCNN
from ssimkd.losses import SSIMLoss
from ssimkd.utils.compat import model_zoo

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader, lr_multiplier, model = _zoo.dataloader, _zoo.lr_multiplier, _zoo.model
optimizer, train = _zoo.optimizer, _zoo.train

model._target_ = DistillRCNN
model.distiller = L(Distiller)(
    teacher=dict(
        config="COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml", weights="", opts=[]
    ),
    losses=[L(SSIMLoss)()],
)

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/ssimkd_mask_rcnn_R50"
