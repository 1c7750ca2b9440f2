"""The features of a classification network at four strides.

    feature   stride   shape
    res2      4        (N, C2, H / 4, W / 4)
    res3      8        (N, C3, H / 8, W / 8)
    res4      16       (N, C4, H / 16, W / 16)
    res5      32       (N, C5, H / 32, W / 32)

The feature of a stride is the last one that a network computes at it. A run of the network finds
these features.
"""

from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
COARSEST = 32
PROBE = (224, 320)  # height and width of the image that finds the features; the sides differ


def used_parameters(body: nn.Module, features: Sequence[str]) -> Dict[str, nn.Parameter]:
    """The trained parameters that some of its features depend on, by name.

    Args:
        body (nn.Module): a network that returns a dict of features.
        features (sequence[str]): some of them. A coarse one may not depend on all that a finer one
            depends on: in an HRNet each has a branch of its own.
    """
    named = {name: p for name, p in body.named_parameters() if p.requires_grad}
    training = body.training
    body.eval()
    with torch.enable_grad():
        maps = body(torch.zeros(1, 3, 2 * COARSEST, 2 * COARSEST))
        total = torch.stack([maps[feature].sum() for feature in features]).sum()
        gradients = torch.autograd.grad(total, [*named.values()], allow_unused=True)
    body.train(training)
    return {name: p for (name, p), x in zip(named.items(), gradients) if x is not None}


def train_only(body: nn.Module, parameters: Dict[str, nn.Parameter]) -> None:
    """Trains these parameters alone: some networks of timm keep more than their features need."""
    body.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)


@torch.no_grad()
def check_shapes(body: nn.Module) -> None:
    """Runs a network that returns features of STRIDES on two images of different sizes.

    Raises:
        ValueError: a map does not have the layout (N, C, H, W), or not its stride.
    """
    training = body.training
    body.eval()
    for height, width in (PROBE, (2 * COARSEST, 3 * COARSEST)):
        for feature, x in body(torch.zeros(1, 3, height, width)).items():
            size = height // STRIDES[feature], width // STRIDES[feature]
            if x.dim() != 4 or tuple(x.shape[2:]) != size:
                raise ValueError(
                    f"its map of stride {STRIDES[feature]} is {tuple(x.shape)} for an image of "
                    f"{height} x {width}; it must be (1, C, {size[0]}, {size[1]})"
                )
    body.train(training)


@torch.no_grad()
def find_features(network: nn.Module) -> Tuple[Dict[str, str], Dict[str, int]]:
    """Where a network computes the features of STRIDES.

    A module that halves the resolution of its input ends a stride: its input is the feature. The
    feature of the coarsest stride is the last output that has it.

    Args:
        network (nn.Module): takes (N, 3, H, W).

    Returns:
        dict[str, str]: feature -> the name of the module that returns it.
        dict[str, int]: feature -> its channels.

    Raises:
        ValueError: the network has no feature of one of the strides in the layout (N, C, H, W).
    """
    module_of: Dict[int, str] = {}  # id of a tensor -> the outermost module that returned it
    outputs: List[Tensor] = []  # keeps the tensors alive, so that their ids stay theirs
    by_stride: Dict[int, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
            before, after = stride_of(inputs[0]) if inputs else 0, stride_of(output)
            if after:
                outputs.append(output)
                module_of[id(output)] = name  # inner modules come first
            if before and after == 2 * before:
                by_stride[before] = inputs[0]
            if after == COARSEST:
                by_stride[COARSEST] = output

        return hook

    handles = [
        module.register_forward_hook(note(name)) for name, module in network.named_modules() if name
    ]
    training = network.training
    network.eval()
    try:
        network(torch.zeros(1, 3, *PROBE))
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    modules, channels = {}, {}
    for feature, stride in STRIDES.items():
        tensor = by_stride.get(stride)
        if tensor is None or id(tensor) not in module_of:
            raise ValueError(f"it has no feature of stride {stride} in the layout (N, C, H, W)")
        modules[feature] = module_of[id(tensor)]
        channels[feature] = tensor.shape[1]
    return modules, channels


def stride_of(x: Any) -> int:
    """Pixels per cell of a map (N, C, H, W) of the image PROBE; 0 for anything else."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return 0
    stride = PROBE[0] // x.shape[2] if x.shape[2] else 0
    return stride if stride and tuple(x.shape[2:]) == tuple(n // stride for n in PROBE) else 0
