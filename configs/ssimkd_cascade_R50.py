# Cascade Mask R-CNN R50-FPN learns from the zoo's Mask R-CNN X101-FPN 3x, which has 44.3 box AP
# and 39.5 mask AP.
#
#   python train_net.py --config-file configs/ssimkd_cascade_R50.py --num-gpus 8
#
# Cost: 63 GPU-hours for the student and at most 46 more for the teacher, estimated.
# Expected: without a teacher this student has 42.1 box AP and 36.4 mask AP (zoo).
from detectron2.config import LazyCall as L
from ssimkd import Distiller, DistillRCNN
from ssimkd.losses import SSIMLoss
from ssimkd.utils.compat import model_zoo

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader, lr_multiplier = _zoo.dataloader, _zoo.lr_multiplier
optimizer, train = _zoo.optimizer, _zoo.train

# The zoo has this model as a LazyConfig but no experiment with it: the settings are its .yaml's.
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
train.output_dir = "output/ssimkd_cascade_R50"
