# RetinaNet R18-FPN, 1x, learns from the zoo's RetinaNet R50-FPN 3x (box AP 38.7). Its ImageNet
# weights come from torchvision: python tools/convert_torchvision.py resnet18 --out weights/R-18.pth
#
#   python train_net.py --config-file configs/ssimkd_retinanet_R18_1x_from_R50.py --num-gpus 8
#
# Cost: the zoo has no R18; less than the 41 GPU-hours of R50 for the student alone, at most 14 more
# for the teacher's backbone (README.md). The paper: 32.6 -> 36.1 (as reported, MMDetection); its
# teacher and schedule are not known here.
from .ssimkd_retinanet_R18_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.teacher.config = "COCO-Detection/retinanet_R_50_FPN_3x.yaml"
train.output_dir = "output/ssimkd_retinanet_R18_1x_from_R50"
