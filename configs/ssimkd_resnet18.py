# Faster R-CNN ResNet-18-FPN learns from the zoo's Faster R-CNN R101-FPN 3x (42.0 box AP).
# The student starts from torchvision's ImageNet weights, which are downloaded.
#
#   python train_net.py --config-file configs/ssimkd_resnet18.py --num-gpus 8
#
# Cost: less than the 42 GPU-hours of R50 for the student and at most 20 more for the teacher,
# estimated.
# Expected: not known. No figure is published for this student.
from .ssimkd_mobilenet_v2 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up.name = "resnet18"
train.output_dir = "output/ssimkd_resnet18"
