# ssimkd_retinanet_R18_1x_from_R101 without its teacher: RetinaNet R18-FPN, which the zoo does not
# have. Its ImageNet weights come from torchvision: python tools/convert_torchvision.py resnet18
# --out weights/R-18.pth
#
#   python train_net.py --config-file configs/vanilla_retinanet_R18_1x.py --num-gpus 8
#
# Cost: the zoo has no R18; less than the 41 GPU-hours of R50 for the student alone. The paper: 32.6
# (as reported, MMDetection).
from .ssimkd_retinanet_R18_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.losses = []
train.output_dir = "output/vanilla_retinanet_R18_1x"
