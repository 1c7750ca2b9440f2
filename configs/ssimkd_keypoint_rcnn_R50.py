# Keypoint R-CNN R50-FPN learns from the zoo's Keypoint R-CNN R101-FPN 3x, which has 56.4 box AP
# and 66.1 keypoint AP.
#
#   python train_net.py --config-file configs/ssimkd_keypoint_rcnn_R50.py --num-gpus 8
#
# Cost: 63 GPU-hours for the student and at most 26 more for the teacher, estimated.
# Expected: without a teacher this student has 53.6 box AP and 64.0 keypoint AP (zoo).
from detectron2.config import LazyCall as L
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from ssimkd import Distiller, DistillRCNN
from ssimkd.losses import SSIMLoss
from ssimkd.utils.compat import model_zoo

_zoo = model_zoo.get_config("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py")
dataloader, lr_multiplier, model = _zoo.dataloader, _zoo.lr_multiplier, _zoo.model
optimizer, train = _zoo.optimizer, _zoo.train

# The pairs of left and right keypoints follow an override of the data set.
dataloader.train.mapper.keypoint_hflip_indices = L(create_keypoint_hflip_indices)(
    dataset_names="${dataloader.train.dataset.names}"
)

model._target_ = DistillRCNN
model.distiller = L(Distiller)(
    teacher=dict(config="COCO-Keypoints/keypoint_rcnn_R_101_FPN_3x.yaml", weights="", opts=[]),
    losses=[L(SSIMLoss)()],
)

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/ssimkd_keypoint_rcnn_R50"
