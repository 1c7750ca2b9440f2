#!/usr/bin/env python
r"""Converts torchvision's ImageNet weights of a ResNet to a file for MODEL.WEIGHTS.

    python tools/convert_torchvision.py resnet18 --out weights/R-18.pth

Detectron2's zoo has no ResNet-18 and no ResNet-34. The weights are torchvision's IMAGENET1K_V1.
Their images are prepared in another way than those of the zoo's backbones, so the config needs

    MODEL:
      WEIGHTS: "weights/R-18.pth"
      PIXEL_MEAN: [123.675, 116.28, 103.53]
      PIXEL_STD: [58.395, 57.12, 57.375]
      RESNETS:
        DEPTH: 18
        RES2_OUT_CHANNELS: 64  # for 18 and 34; the others keep Detectron2's 256
        STRIDE_IN_1X1: False
        NORM: "FrozenBN"       # or "BN"
    INPUT:
      FORMAT: "RGB"

A teacher still gets the images as its own config prepares them.
"""

import argparse
import os
import re
from typing import Dict

import torch
from ssimkd.checkpoint.export import read_weights
from ssimkd.errors import ConfigError, as_config_error, exit_in_one_line
from torch import Tensor
from torchvision import models

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def read(architecture: str, path: str) -> Dict[str, Tensor]:
    """The tensors of the backbone by torchvision's names, from a file or from torchvision.

    Raises:
        ConfigError: they cannot be read or downloaded, or belong to another network.
    """
    if not path:
        what = f"--weights: cannot download {architecture}; give a file instead"
        with as_config_error(what, Exception):
            model = getattr(models, architecture)(weights="IMAGENET1K_V1")
        return backbone_of(model.state_dict())
    weights = backbone_of(read_weights(path))
    expected = backbone_of(getattr(models, architecture)().state_dict())
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in expected.items()}:
        raise ConfigError(f"--weights: {path} does not hold a {architecture}")
    return weights


def backbone_of(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The tensors of a classifier without its last layer and its counters of training steps."""
    left_out = re.compile(r"fc\..*|.*\.num_batches_tracked")
    return {k: v for k, v in state_dict.items() if not left_out.fullmatch(k)}


def detectron2_name(name: str) -> str:
    """The name of a tensor in Detectron2's ResNet, such as res2.0.conv1.norm.bias."""
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = name.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")
    return re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("--out", required=True, help=".pth file to write")
    parser.add_argument("--weights", default="", help="file with a state dict of torchvision")
    args = parser.parse_args()
    with exit_in_one_line():
        if not args.out.endswith(".pth"):
            raise ConfigError(f"--out: {args.out} must end in .pth, or Detectron2 cannot read it")
        weights = read(args.architecture, args.weights)
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        content = {
            "model": {detectron2_name(k): v for k, v in weights.items()},
            "__author__": "torchvision",
            "matching_heuristics": True,  # Detectron2 then finds the backbone in any detector
        }
        torch.save(content, args.out + ".tmp")  # an interruption leaves the former file
        os.replace(args.out + ".tmp", args.out)


if __name__ == "__main__":
    main()
