"""How a detector turns images into what its backbone is given."""

from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from detectron2.config import CfgNode
from omegaconf import OmegaConf
from torch import Tensor, nn

from ssimkd.errors import ConfigError


class Preprocessing(NamedTuple):
    """The settings of one detector. Teacher and student share a batch if theirs are equal.

    Attributes:
        input_format (str): channel order, "BGR" or "RGB", or another format of Detectron2's images.
        function (Any): the detector's own `preprocess_image`, as its class defines it.
        mean, std (tuple[float]): one number per channel; () if they are not known.
        padding (tuple): what the sides of a batch are rounded up to.
    """

    input_format: str
    function: Any = None
    mean: Tuple[float, ...] = ()
    std: Tuple[float, ...] = ()
    padding: Tuple = ()

    @property
    def is_own(self) -> bool:
        """Whether the user has written `function`; it may do more than normalise and pad."""
        module = getattr(self.function, "__module__", None) or "detectron2"
        return module.split(".")[0] != "detectron2"


def preprocessing_of(detector: Any, input_format: str) -> Preprocessing:
    """The preprocessing of a detector whose images come in `input_format`.

    If the detector has no `pixel_mean` and `pixel_std`, its preprocessing never equals a teacher's.
    """
    function = getattr(type(detector), "preprocess_image", None)
    if not (hasattr(detector, "pixel_mean") and hasattr(detector, "pixel_std")):
        return Preprocessing(input_format, function)
    padding = ("size_divisibility", "padding_constraints")  # a user's backbone may lack them
    return Preprocessing(
        input_format,
        function,
        tuple(detector.pixel_mean.flatten().tolist()),
        tuple(detector.pixel_std.flatten().tolist()),
        tuple(getattr(detector.backbone, name, None) for name in padding),
    )


def training_image_format(cfg, model: nn.Module) -> str:
    """The format of the images that a detector was trained on, from its config.

    Raises:
        ConfigError: the config does not name it.
    """
    found: Optional[str]
    if isinstance(cfg, CfgNode):
        found = cfg.INPUT.FORMAT
    else:
        found = OmegaConf.select(cfg, "dataloader.train.mapper.image_format")
        found = found or getattr(model, "input_format", None)
    if not found:
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.OPTS: the teacher's image format is {found!r}; set "
            "INPUT.FORMAT (.yaml) or dataloader.train.mapper.image_format (.py)"
        )
    return found


def convert_channel_order(images: List[Tensor], given: str, wanted: str) -> List[Tensor]:
    """Images (C, H, W) in the format `given`, converted to the format `wanted`.

    Raises:
        ConfigError: the formats differ, and they are not "BGR" and "RGB".
    """
    if given == wanted:
        return images
    if {given, wanted} != {"BGR", "RGB"}:
        raise ConfigError(
            f"INPUT.FORMAT (.yaml) or model.input_format (.py) is {given!r} and the teacher's, by "
            f"MODEL.DISTILL.TEACHER.OPTS, {wanted!r}: only BGR and RGB can be converted"
        )
    return [image.flip(0) for image in images]


def undo(images: Tensor, given: List[Tensor], preprocessing: Preprocessing) -> List[Tensor]:
    """The images that a detector made of those given, before it normalised and padded them.

    Args:
        images (Tensor): (N, C, H, W), what its backbone was given.
        given (list[Tensor]): N images (C, h, w), what the detector was given.
        preprocessing (Preprocessing): the detector's.

    Returns:
        list[Tensor]: (C, h, w) each, in the units of those given.
    """
    mean, std = (images.new_tensor(x)[:, None, None] for x in preprocessing[2:4])
    return [x[:, : y.shape[-2], : y.shape[-1]] * std + mean for x, y in zip(images, given)]


def check_undone(undone: List[Tensor], given: List[Tensor], preprocessing: Preprocessing) -> None:
    """Checks what :func:`undo` returns. It waits for a GPU, so once is enough.

    Raises:
        ConfigError: images have become smaller, or are not normalised by mean and std alone.
    """
    for found, before in zip(undone, given):
        before = before.to(found)
        same_size = found.shape == before.shape
        # a flip keeps the deviation, and other changes of colour and place nearly do
        if not same_size or not 0.2 * before.std() <= found.std() + 1e-3 <= 5 * before.std() + 1:
            raise ConfigError(
                f"model: {preprocessing.function.__qualname__} resizes images or scales their "
                "values by more than pixel_mean and pixel_std, so the teacher cannot be shown "
                "what the student sees: do this in the mapper"
            )


def check_padding(images: Tensor, given: List[Tensor], preprocessing: Preprocessing) -> None:
    """Checks that no image was moved or enlarged into the padding of its batch.

    It waits for a GPU, so once is enough. The arguments are those of :func:`undo`.

    Raises:
        ConfigError: the padding is not the same everywhere, but for what a blur leaves there.
    """
    for x, before in zip(images, given):
        height, width = before.shape[-2:]
        padding = torch.cat([x[:, height:].flatten(1), x[:, :, width:].flatten(1)], dim=1)
        if padding.numel() and padding.std(dim=1).max() > 0.5 * x[:, :height, :width].std():
            raise ConfigError(
                f"model: {preprocessing.function.__qualname__} moves images into the padding of "
                "the batch, or enlarges them, so the teacher cannot be shown what the student "
                "sees: do this in the mapper, or image by image before they are padded"
            )


def image_format_of(detector: Any) -> str:
    """The channel order of the images that a detector takes; "BGR" if it names none.

    Most of Detectron2's detectors have an `input_format`. All students have an `image_format`.
    """
    found: Any = getattr(detector, "input_format", None)
    return found or getattr(detector, "image_format", "BGR")
