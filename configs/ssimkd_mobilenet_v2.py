# Faster R-CNN MobileNetV2-FPN learns from the zoo's Faster R-CNN R101-FPN 3x (42.0 box AP).
# The student starts from torchvision's ImageNet weights, which are downloaded.
#
#   python train_net.py --config-file configs/ssimkd_mobilenet_v2.py --num-gpus 8
#
# Cost: less than the 42 GPU-hours of R50 for the student and at most 20 more for the teacher,
# estimated.
# Expected: not known. No figure is published for this student.
from detectron2.config import LazyCall as L
from ssimkd.modeling.backbones import TorchvisionBackbone

from .ssimkd_R50 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = L(TorchvisionBackbone)(
    name="mobilenet_v2",
    weights="DEFAULT",
    freeze_at=2,
    out_features=["res2", "res3", "res4", "res5"],
)
model.pixel_mean, model.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
# as in torchvision; the teacher still gets BGR
model.input_format = dataloader.train.mapper.image_format = "RGB"
train.init_checkpoint = ""
train.output_dir = "output/ssimkd_mobilenet_v2"
