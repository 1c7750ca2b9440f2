"""The teacher: frozen, and run by its own rules."""

from typing import Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from omegaconf import OmegaConf
from torch import Tensor, nn

from .errors import ConfigError
from .teacher_spec import TeacherSpec


class Teacher:
    """A frozen detector of which only backbone and neck run.

    It is no nn.Module: so it is in no `parameters()`, checkpoint or DDP bucket of a module that
    holds it, and no `train()` reaches it.

    Args:
        spec (TeacherSpec): what to build and load.
        device (torch.device): where it starts; it follows its inputs later.

    Raises:
        ConfigError: the config or checkpoint cannot be read, or the checkpoint does not hold every
            tensor of the backbone in its shape and finite.
    """

    def __init__(self, spec: TeacherSpec, device: torch.device) -> None:
        model, cfg, _ = spec.load(device)
        self.input_format = trained_format(cfg, model)
        self.shapes: Dict[str, ShapeSpec] = model.backbone.output_shape()
        for name, _ in list(model.named_children()):
            if name != "backbone":
                delattr(model, name)  # the heads never run: their memory is free
        self.model = model

    def __deepcopy__(self, memo) -> "Teacher":
        return self  # constant: copies of a student share it

    @torch.no_grad()
    def __call__(
        self, batched_inputs: List[Dict], input_format: str, device: torch.device
    ) -> Tuple[Dict[str, Tensor], Tuple[int, int]]:
        """Runs backbone and neck on a batch of the student's.

        Args:
            batched_inputs (list[dict]): "image" is (3, H, W) in [0, 255].
            input_format (str): channel order of these images, "BGR" or "RGB".
            device (torch.device): where the maps are wanted.

        Returns:
            dict[str, Tensor]: level -> (N, C, H, W).
            (int, int): height and width of the padded images, in pixels.
        """
        if self.model.pixel_mean.device != device:
            self.model.to(device)
        images = as_seen([x["image"] for x in batched_inputs], input_format, self.input_format)
        batch = self.model.preprocess_image([{"image": image} for image in images]).tensor
        return self.model.backbone(batch), tuple(batch.shape[-2:])


def as_seen(images: List[Tensor], shown: str, wanted: str) -> List[Tensor]:
    """Images (3, H, W) in the channel order `shown` ("BGR" or "RGB"), turned to that of `wanted`.

    Raises:
        ConfigError: `shown` is another format.
    """
    if shown not in ("BGR", "RGB"):
        raise ConfigError(
            f"INPUT.FORMAT (.yaml) or model.input_format (.py): images in {shown!r} cannot be "
            f"shown to a teacher for {wanted}; use BGR or RGB"
        )
    return images if shown == wanted else [image.flip(0) for image in images]


def trained_format(cfg, model: nn.Module) -> str:
    """Channel order of the images that a detector was trained on.

    Raises:
        ConfigError: its config does not say, or names another format than BGR and RGB.
    """
    if isinstance(cfg, CfgNode):
        found: Optional[str] = cfg.INPUT.FORMAT
    else:
        found = OmegaConf.select(cfg, "dataloader.train.mapper.image_format")
        found = found or getattr(model, "input_format", None)
    if found not in ("BGR", "RGB"):
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.OPTS: the teacher's image format is {found!r}; set "
            "INPUT.FORMAT (.yaml) or dataloader.train.mapper.image_format (.py) to BGR or RGB"
        )
    return found
