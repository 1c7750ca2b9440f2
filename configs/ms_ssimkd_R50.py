# ssimkd_R50 with SSIM at several scales: on the embedded data level with SSIM (docs/comparison.md).
# It is computed by autograd: slower than the fast form of SSIM.
#
#   python train_net.py --config-file configs/ms_ssimkd_R50.py --num-gpus 8
from detectron2.config import LazyCall as L
from ssimkd.losses import MSSSIMLoss

from .ssimkd_R50 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.distiller.losses = [L(MSSSIMLoss)()]
train.output_dir = "output/ms_ssimkd_R50"
