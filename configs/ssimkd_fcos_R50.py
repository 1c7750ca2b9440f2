# FCOS R50-FPN learns from the zoo's RetinaNet R101-FPN 3x, which has 40.4 box AP. Detectron2 has
# FCOS since v0.6, and only as a LazyConfig.
#
#   python train_net.py --config-file configs/ssimkd_fcos_R50.py --num-gpus 8
#
# Cost: not known for the student, at most 20 GPU-hours for the teacher, estimated.
# Expected: the zoo gives no figure for FCOS.
from detectron2.config import LazyCall as L
from ssimkd import Distiller
from ssimkd.losses import SSIMLoss
from ssimkd.modeling.meta_arch import DistillFCOS
from ssimkd.utils.compat import model_zoo

_zoo = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
dataloader, lr_multiplier, model = _zoo.dataloader, _zoo.lr_multiplier, _zoo.model
optimizer, train = _zoo.optimizer, _zoo.train

model._target_ = DistillFCOS
model.distiller = L(Distiller)(
    teacher=dict(config="COCO-Detection/retinanet_R_101_FPN_3x.yaml", weights="", opts=[]),
    losses=[L(SSIMLoss)()],
    in_features=["p3", "p4", "p5", "p6", "p7"],
)

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/ssimkd_fcos_R50"
