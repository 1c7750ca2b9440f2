# RetinaNet R18-FPN learns from the zoo's RetinaNet R101-FPN 3x, which has 40.4 box AP. The student
# starts from torchvision's ImageNet weights, which the first command fetches and converts.
#
#   python tools/convert_torchvision.py resnet18 --out weights/R-18.pth
#   python train_net.py --config-file configs/ssimkd_retinanet_R18.py --num-gpus 8
#
# Cost: less than the 41 GPU-hours of R50 for the student and at most 20 more for the teacher,
# estimated.
# Expected: the zoo has no R18. The paper reports a rise from 32.6 to 36.1 in MMDetection; it is not
# known here with which teacher and schedule.
from .ssimkd_retinanet_R50 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up.stages.depth = 18
model.backbone.bottom_up.stages.pop("stride_in_1x1")  # ResNet-18 has no bottlenecks
model.backbone.top_block.in_channels = 512

model.pixel_mean, model.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
# torchvision trained in RGB; the teacher still gets BGR
model.input_format = dataloader.train.mapper.image_format = "RGB"
train.init_checkpoint = "weights/R-18.pth"
train.output_dir = "output/ssimkd_retinanet_R18"
