"""The attention of FKD and FGD: where, and in which channels, a map has large values.

It has no parameters (Zhang & Ma, ICLR 2021; Yang et al., CVPR 2022). Maps are (n, C, h, w).
"""

from torch import Tensor


def spatial_attention(maps: Tensor, temperature: float) -> Tensor:
    """h w softmax(mean over channels of |F| / temperature): (n, 1, h, w), with mean 1 per image."""
    n, _, h, w = maps.shape
    activity = maps.abs().mean(dim=1).flatten(1)  # (n, h w)
    return (h * w * (activity / temperature).softmax(dim=1)).view(n, 1, h, w)


def channel_attention(maps: Tensor, temperature: float) -> Tensor:
    """C softmax(mean over cells of |F| / temperature): (n, C, 1, 1), with mean 1 per image."""
    activity = maps.abs().mean(dim=(2, 3), keepdim=True)  # (n, C, 1, 1)
    return maps.shape[1] * (activity / temperature).softmax(dim=1)
