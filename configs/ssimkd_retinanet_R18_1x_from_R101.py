# RetinaNet R18-FPN, 1x, learns from the zoo's RetinaNet R101-FPN 3x (box AP 40.4). Its ImageNet
# weights come from torchvision: python tools/convert_torchvision.py resnet18 --out weights/R-18.pth
#
#   python train_net.py --config-file configs/ssimkd_retinanet_R18_1x_from_R101.py --num-gpus 8
#
# Cost: the zoo has no R18; less than the 41 GPU-hours of R50 for the student alone, at most 20 more
# for the teacher's backbone (README.md). The paper: 32.6 -> 36.1 (as reported, MMDetection); its
# teacher and schedule are not known here.
from .ssimkd_retinanet_R50_1x_from_R101 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up.stages.depth = 18
model.backbone.bottom_up.stages.pop("stride_in_1x1")  # ResNet-18 has no bottlenecks
model.backbone.top_block.in_channels = 512

model.pixel_mean, model.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
# as torchvision trained it; the teacher is shown its own BGR
model.input_format = dataloader.train.mapper.image_format = "RGB"
train.init_checkpoint = "weights/R-18.pth"
train.output_dir = "output/ssimkd_retinanet_R18_1x_from_R101"
