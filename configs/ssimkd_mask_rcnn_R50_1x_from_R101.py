# Mask R-CNN R50-FPN, 1x, learns from the zoo's Mask R-CNN R101-FPN 3x (box AP 42.9, mask AP 38.6).
#
#   python train_net.py --config-file configs/ssimkd_mask_rcnn_R50_1x_from_R101.py --num-gpus 8
#
# Cost: 52 GPU-hours for the student alone, at most 23 more for the teacher's backbone (README.md).
# Undistilled: box AP 38.6, mask AP 35.2 (zoo).
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
train.output_dir = "output/ssimkd_mask_rcnn_R50_1x_from_R101"
