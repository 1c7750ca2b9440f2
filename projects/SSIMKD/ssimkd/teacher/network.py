"""A teacher's backbone and neck, changed so that they run faster.

Two changes are always made, because they only change the rounding: batch norms are folded into
convolutions, and the memory layout is the one that the device prefers. Half precision and
torch.compile are options; docs/performance.md says what each of them saves and costs.
"""

from typing import Any, Dict, Iterable

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ssimkd.errors import as_config_error

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# In evaluation each of these is an affine map per channel. A subclass may do something else
FOLDED = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)


class TeacherNetwork:
    """Runs a backbone.

    Args:
        backbone (nn.Module): in evaluation mode; it returns maps by level. It is changed in place.
        device (torch.device): where it will run.
        precision (str): of weights and arithmetic, one of PRECISIONS.
        compiled (bool): run it through torch.compile.
    """

    def __init__(
        self, backbone: nn.Module, device: torch.device, precision: str, compiled: bool
    ) -> None:
        fold_norms(backbone)
        self.dtype = PRECISIONS[precision]
        # On a CPU convolutions are faster with channels last, and so are tensor cores in half
        # precision. For a GPU in float32 nothing was measured, so its layout stays.
        channels_last = device.type == "cpu" or precision != "float32"
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        backbone.to(memory_format=self.layout)
        if precision != "float32":
            backbone.to(self.dtype)
        self.run = torch.compile(backbone) if compiled else backbone

    def __call__(self, images: Tensor) -> Dict[str, Tensor]:
        """Maps of a batch: level -> (N, C, H', W') in float32, contiguous.

        Args:
            images (Tensor): (N, 3, H, W), normalised and padded, in float32.

        Raises:
            ConfigError: torch.compile fails.
        """
        failure = (
            "MODEL.DISTILL.TEACHER.COMPILE: torch.compile fails for this teacher or on this "
            "machine; set it to False"
        )
        with as_config_error(failure, torch._dynamo.exc.TorchDynamoException):
            maps = self.run(images.to(self.dtype, memory_format=self.layout))
        return {
            level: x.to(images.dtype, memory_format=torch.contiguous_format)
            for level, x in maps.items()
        }


def fold_norms(network: nn.Module) -> None:
    """Folds the batch norm of each Conv2d of Detectron2 into its weights, in place.

    The outputs stay the same except for rounding. Other norms (GN, LN) stay, and so do the norms of
    other layers: a deformable convolution or a subclass of Conv2d may have another forward.
    """
    layers: Iterable[Any] = network.modules()
    for conv in layers:
        if type(conv) is not Conv2d or type(conv.norm) not in FOLDED:
            continue
        norm = conv.norm
        if norm.running_mean is None:  # it normalises by the batch, even in evaluation
            continue
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        conv.norm = None
