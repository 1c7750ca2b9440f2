# RetinaNet R50-FPN, 1x, learns from the zoo's RetinaNet R101-FPN 3x (box AP 40.4).
#
#   python train_net.py --config-file configs/ssimkd_retinanet_R50_1x_from_R101.py --num-gpus 8
#
# Cost: 41 GPU-hours for the student alone, at most 20 more for the teacher's backbone (README.md).
# Undistilled: box AP 37.4 (zoo). The paper, of such a pair: 36.4 -> 40.1 (as reported,
# MMDetection).
from detectron2.config import LazyCall as L
from ssimkd import Distiller, DistillRetinaNet
from ssimkd.losses import SSIMLoss
from ssimkd.utils.compat import model_zoo

_zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
dataloader, lr_multiplier, model = _zoo.dataloader, _zoo.lr_multiplier, _zoo.model
optimizer, train = _zoo.optimizer, _zoo.train

model._target_ = DistillRetinaNet
model.distiller = L(Distiller)(
    teacher=dict(config="COCO-Detection/retinanet_R_101_FPN_3x.yaml", weights="", opts=[]),
    losses=[L(SSIMLoss)()],
    in_features=["p3", "p4", "p5", "p6", "p7"],
)

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/ssimkd_retinanet_R50_1x_from_R101"
