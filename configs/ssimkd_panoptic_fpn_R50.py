# Panoptic FPN R50 learns from the zoo's Panoptic FPN R101 3x, which has 42.4 box AP, 38.5 mask AP
# and 43.0 PQ.
#
#   python train_net.py --config-file configs/ssimkd_panoptic_fpn_R50.py --num-gpus 8
#
# Cost: 61 GPU-hours for the student and at most 27 more for the teacher, estimated.
# Expected: without a teacher this student has 37.6 box AP, 34.7 mask AP and 39.4 PQ (zoo).
from detectron2.config import LazyCall as L
from ssimkd import Distiller, DistillPanopticFPN
from ssimkd.losses import SSIMLoss
from ssimkd.utils.compat import model_zoo

_zoo = model_zoo.get_config("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py")
dataloader, lr_multiplier, model = _zoo.dataloader, _zoo.lr_multiplier, _zoo.model
optimizer, train = _zoo.optimizer, _zoo.train

model._target_ = DistillPanopticFPN
model.distiller = L(Distiller)(
    teacher=dict(
        config="COCO-PanopticSegmentation/panoptic_fpn_R_101_3x.yaml", weights="", opts=[]
    ),
    losses=[L(SSIMLoss)()],
)

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/ssimkd_panoptic_fpn_R50"
