"""The teacher: frozen, and run by its own rules."""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from omegaconf import OmegaConf
from torch import Tensor, nn

from ssimkd.errors import ConfigError

from .cache import TeacherCache
from .network import TeacherNetwork
from .spec import TeacherSpec


class Preprocessing(NamedTuple):
    """How a detector turns images into what its backbone is given.

    Attributes:
        input_format (str): channel order, "BGR" or "RGB", or another format of Detectron2's images.
        code (Any): its preprocess_image, as a function.
        mean, std (tuple[float]): by channel.
        padding (tuple): what the sides of a batch are rounded up to.
    """

    input_format: str
    code: Any = None
    mean: Tuple[float, ...] = ()
    std: Tuple[float, ...] = ()
    padding: Tuple = ()


def preprocessing_of(detector: Any, input_format: str) -> Preprocessing:
    """The rules of a detector for images in `input_format`; those of a strange one are unknown."""
    if not (hasattr(detector, "pixel_mean") and hasattr(detector, "pixel_std")):
        return Preprocessing(input_format)
    backbone = detector.backbone  # not every one is Detectron2's Backbone
    padding = [
        getattr(backbone, name, None) for name in ("size_divisibility", "padding_constraints")
    ]
    return Preprocessing(
        input_format,
        getattr(type(detector), "preprocess_image", None),
        tuple(detector.pixel_mean.flatten().tolist()),
        tuple(detector.pixel_std.flatten().tolist()),
        tuple(padding),
    )


class Teacher:
    """A frozen detector of which only backbone and neck run.

    It is no nn.Module: so it is in no `parameters()`, checkpoint or DDP bucket of a module that
    holds it, and no `train()` reaches it.

    Args:
        spec (TeacherSpec): what to build and load.
        device (torch.device): where it starts; it follows its inputs later.

    Raises:
        ConfigError: the config or checkpoint cannot be read, or the checkpoint does not hold every
            tensor of the backbone in its shape and finite; or the folder for its maps cannot be
            used.
    """

    def __init__(self, spec: TeacherSpec, device: torch.device) -> None:
        model, cfg, _ = spec.load(device)
        self.rules = preprocessing_of(model, training_image_format(cfg, model))
        self.shapes: Dict[str, ShapeSpec] = model.backbone.output_shape()
        for name, _ in list(model.named_children()):
            if name != "backbone":
                delattr(model, name)  # the heads never run: their memory is free
        self.model = model
        self.cache: Optional[TeacherCache] = None
        if spec.cache:
            settings = f"{cfg}\n{spec.precision}"
            self.cache = TeacherCache(spec.cache, spec.cache_gib, model.backbone, settings)
        self.network = TeacherNetwork(model.backbone, device, spec.precision, spec.compile)

    def __deepcopy__(self, memo) -> "Teacher":
        return self  # constant: copies of a student share it

    # inference_mode is not faster (docs/performance.md), and autograd could not save its maps
    @torch.no_grad()
    def __call__(
        self, batched_inputs: List[Dict], images: Tensor, rules: Preprocessing
    ) -> Tuple[Dict[str, Tensor], Tuple[int, int]]:
        """Runs backbone and neck on a batch of the student's.

        Args:
            batched_inputs (list[dict]): "image" is (C, H, W) in [0, 255].
            images (Tensor): (N, C, H, W), what the student made of them; it is used where its rules
                are the teacher's, too. The maps are wanted where it is.
            rules (Preprocessing): the student's.

        Returns:
            dict[str, Tensor]: level -> (N, C, H, W).
            (int, int): height and width of the padded images, in pixels.
        """
        if self.model.pixel_mean.device != images.device:
            self.model.to(images.device)
        if rules != self.rules:
            images = self.preprocess(batched_inputs, rules.input_format)
        maps = self.network(images) if self.cache is None else self.cache(self.network, images)
        height, width = images.shape[-2:]
        return maps, (height, width)

    def preprocess(self, batched_inputs: List[Dict], input_format: str) -> Tensor:
        """(N, C, H, W): images in `input_format`, normalised and padded by the teacher's rules."""
        images = [x["image"] for x in batched_inputs]
        images = convert_channel_order(images, input_format, self.rules.input_format)
        return self.model.preprocess_image([{"image": image} for image in images]).tensor


def convert_channel_order(images: List[Tensor], shown: str, wanted: str) -> List[Tensor]:
    """Images (C, H, W) in the format `shown`, turned to the format `wanted`.

    Raises:
        ConfigError: they differ, and are not "BGR" and "RGB".
    """
    if shown == wanted:
        return images
    if {shown, wanted} != {"BGR", "RGB"}:
        raise ConfigError(
            f"INPUT.FORMAT (.yaml) or model.input_format (.py) is {shown!r} and the teacher's, by "
            f"MODEL.DISTILL.TEACHER.OPTS, {wanted!r}: BGR and RGB alone can differ"
        )
    return [image.flip(0) for image in images]


def training_image_format(cfg, model: nn.Module) -> str:
    """Format of the images that a detector was trained on.

    Raises:
        ConfigError: its config does not say.
    """
    if isinstance(cfg, CfgNode):
        found: Optional[str] = cfg.INPUT.FORMAT
    else:
        found = OmegaConf.select(cfg, "dataloader.train.mapper.image_format")
        found = found or getattr(model, "input_format", None)
    if not found:
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.OPTS: the teacher's image format is {found!r}; set "
            "INPUT.FORMAT (.yaml) or dataloader.train.mapper.image_format (.py)"
        )
    return found
