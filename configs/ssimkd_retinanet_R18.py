# RetinaNet R18-FPN learns from the zoo's RetinaNet R101-FPN 3x, which has 40.4 box AP. The student
# starts from torchvision's ImageNet weights, which are downloaded.
#
#   python train_net.py --config-file configs/ssimkd_retinanet_R18.py --num-gpus 8
#
# Cost: less than the 41 GPU-hours of R50 for the student and at most 20 more for the teacher,
# estimated.
# Expected: the zoo has no R18. Secondary sources on the paper give a rise from 32.6
# to 36.1 in MMDetection; it is not known here with which teacher and schedule.
from detectron2.config import LazyCall as L
from ssimkd.modeling.backbones import TorchvisionBackbone

from .ssimkd_retinanet_R50 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = L(TorchvisionBackbone)(
    name="resnet18", weights="DEFAULT", freeze_at=2, out_features=["res3", "res4", "res5"]
)
model.backbone.top_block.in_channels = 512

model.pixel_mean, model.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
# torchvision trained in RGB; the teacher still gets BGR
model.input_format = dataloader.train.mapper.image_format = "RGB"
train.init_checkpoint = ""
train.output_dir = "output/ssimkd_retinanet_R18"
