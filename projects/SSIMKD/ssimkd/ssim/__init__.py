"""SSIM of feature maps, in torch alone."""
