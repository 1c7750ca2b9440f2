"""A teacher's backbone and neck, changed so that they run faster.

Two changes are always made, because they only change the rounding: batch norms are folded into
convolutions, and the memory layout is the one that the device prefers. Half precision and
torch.compile are options; docs/performance.md says what each of them saves and costs.
"""

import copy
from typing import Any, Dict, Iterable

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ssimkd.errors import as_config_error

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"  # the precision of the student's autocast
# In evaluation each of these is an affine map per channel. A subclass may do something else
FOLDED = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)


class TeacherNetwork:
    """Runs a backbone.

    Args:
        backbone (nn.Module): in evaluation mode; it returns maps by level. It is changed in place.
        precision (str): of weights and arithmetic, one of PRECISIONS, or AUTO: what torch.autocast
            is set to where it is on, and float32 elsewhere.
        compiled (bool): run it through torch.compile.
    """

    def __init__(self, backbone: nn.Module, precision: str, compiled: bool) -> None:
        fold_norms(backbone)
        self.backbone, self.precision, self.compiled = backbone, precision, compiled
        self.runs: Dict[Any, Any] = {}  # (precision, device) -> what runs there

    def __call__(self, images: Tensor) -> Dict[str, Tensor]:
        """Maps of a batch: level -> (N, C, H', W') in the precision of the arithmetic, contiguous.

        Args:
            images (Tensor): (N, 3, H, W), normalised and padded, in float32.

        Raises:
            ConfigError: torch.compile fails, or an operator does not support the precision.
        """
        device, dtype = images.device, self.dtype_on(images.device)
        if (dtype, device) not in self.runs:
            self.runs[dtype, device] = self.build(dtype, device)
        compiling = as_config_error(
            "MODEL.DISTILL.TEACHER.COMPILE: torch.compile fails for this teacher or on this "
            "machine; set it to False",
            torch._dynamo.exc.TorchDynamoException,
        )
        computing = as_config_error(
            f"MODEL.DISTILL.TEACHER.PRECISION: this teacher cannot run in {dtype}; "
            "set it to float32",
            NotImplementedError if dtype != torch.float32 else (),
        )
        images = images.to(dtype, memory_format=layout_of(dtype, device))
        # under autocast, as in the student, some norms and what is cast to float32 stay in float32
        mixed = self.precision == AUTO and dtype != torch.float32
        with compiling, computing, torch.autocast(device.type, dtype=dtype, enabled=mixed):
            maps = self.runs[dtype, device](images)
        return {level: x.contiguous() for level, x in maps.items()}

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The precision of weights and arithmetic now."""
        if self.precision != AUTO:
            return PRECISIONS[self.precision]
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return torch.float32

    def build(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The backbone in a precision. With AUTO, the one in float32 stays beside it."""
        backbone = self.backbone
        if self.precision == AUTO and dtype != torch.float32:
            # a copied graph of torchvision is in training mode
            backbone = copy.deepcopy(backbone).eval()
        backbone.to(dtype).to(memory_format=layout_of(dtype, device))
        return torch.compile(backbone) if self.compiled else backbone


def layout_of(dtype: torch.dtype, device: torch.device) -> torch.memory_format:
    """Channels last for convolutions on a CPU, and for tensor cores in half precision.

    For a GPU in float32 nothing was measured, so its layout stays.
    """
    if device.type == "cpu" or dtype != torch.float32:
        return torch.channels_last
    return torch.contiguous_format


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
