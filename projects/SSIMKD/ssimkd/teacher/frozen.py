"""The teacher: a frozen detector. Backbone, neck and the heads that a loss needs are run."""

import logging
from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor

from ssimkd.data.datasets import training_classes
from ssimkd.errors import ConfigError

from .heads import describe_heads, head_modules, keep_modules
from .network import TeacherNetwork
from .preprocessing import (
    Preprocessing,
    check_padding,
    check_undone,
    convert_channel_order,
    preprocessing_of,
    training_image_format,
    undo,
)
from .spec import TeacherSpec

logger = logging.getLogger(__name__)


class Teacher:
    """A detector that gives its maps, and predictions of its heads: never trained and never saved.

    It is not an nn.Module. So a student that holds it has none of its tensors in `parameters()`, in
    checkpoints or in the buckets of DistributedDataParallel, and `train()` does not reach it.

    Args:
        spec (TeacherSpec): what to build and load.
        device (torch.device): where it starts. Later it moves to the device of its inputs.
        kinds (sequence[str]): the kinds of its heads that are kept; see `heads.py`.
        stages (int): how many stages of a Cascade's box head are kept.

    Raises:
        ConfigError: the config or the checkpoint cannot be read, or the checkpoint does not hold
            every tensor of the backbone and these heads with its shape and with finite values.
    """

    def __init__(
        self, spec: TeacherSpec, device: torch.device, kinds: Sequence[str] = (), stages: int = 1
    ) -> None:
        model, cfg, absent = spec.load(device)
        spec.warn_of_ignored()
        self.heads = describe_heads(model) if kinds else {}
        self.class_names = training_classes(cfg)
        modules = [
            name
            for kind in kinds
            if self.heads.get(kind)
            for name in head_modules(model, kind, stages)
        ]
        for name, tensor in model.state_dict().items():
            if not name.startswith(tuple(f"{module}." for module in modules)):
                continue
            if name in absent or not torch.isfinite(tensor).all():
                raise ConfigError(
                    f"MODEL.DISTILL.TEACHER.WEIGHTS: a loss of MODEL.DISTILL.LOSSES needs {name}, "
                    "which the checkpoint does not hold in its shape and with finite values"
                )
        self.preprocessing = preprocessing_of(model, training_image_format(cfg, model))
        self.shapes: Dict[str, ShapeSpec] = model.backbone.output_shape()
        keep_modules(model, ["backbone", *modules])
        self.model = model
        # whether a user's own preprocessing can be undone, and leaves the padding as it is
        self.checked = self.checked_padding = False
        self.network = TeacherNetwork(model.backbone, spec.precision, spec.compile)

    def __deepcopy__(self, memo) -> "Teacher":
        return self  # it never changes, so copies of a student share it

    def __reduce__(self) -> Tuple[type, Tuple]:
        return type(None), ()  # a student that is pickled leaves it out, as checkpoints do

    # torch.inference_mode is not faster (docs/performance.md), and autograd could not save its maps
    @torch.no_grad()
    def __call__(
        self, batched_inputs: List[Dict], images: Tensor, preprocessing: Preprocessing
    ) -> Tuple[Dict[str, Tensor], Tuple[int, int]]:
        """Runs backbone and neck on a batch of the student's.

        Args:
            batched_inputs (list[dict]): "image" is (C, H, W) in [0, 255].
            images (Tensor): (N, C, H, W), what the student's backbone was given. The teacher uses
                it as well if it prepares images in the same way.
            preprocessing (Preprocessing): the student's.

        Returns:
            dict[str, Tensor]: level -> (N, C, H, W), on the device of `images`.
            (int, int): height and width of the padded images, in pixels.
        """
        self.move(images.device)
        if preprocessing != self.preprocessing:
            given = [x["image"] for x in batched_inputs]
            if preprocessing.is_own:
                given = self.as_student_sees(given, images, preprocessing)
            images = self.preprocess(given, preprocessing)
        height, width = images.shape[-2:]
        return self.network(images), (height, width)

    def as_student_sees(
        self, given: List[Tensor], images: Tensor, preprocessing: Preprocessing
    ) -> List[Tensor]:
        """The mapper's images with what the student's own code, such as a flip, did to them.

        Raises:
            ConfigError: the student's images do not show what its code did. This is checked at the
                first call and for the first padded batch.
        """
        if not preprocessing.mean:
            if not self.checked:
                logger.warning(
                    "%s is your own, and the model has no pixel_mean and pixel_std: the teacher "
                    "sees the images of the mapper, without what it does to them",
                    preprocessing.function.__qualname__,
                )
            self.checked = True
            return given
        undone = undo(images, given, preprocessing)
        if not self.checked:
            check_undone(undone, given, preprocessing)
        padded = any(x.shape[-2:] != images.shape[-2:] for x in given)
        if padded and not self.checked_padding:
            check_padding(images, given, preprocessing)
            self.checked_padding = True
        self.checked = True
        return undone

    @property
    def device(self) -> torch.device:
        """Where it is now."""
        return next(self.model.parameters()).device

    def move(self, device: torch.device) -> None:
        """Moves it to a device, where it is not there yet."""
        if self.device != device:
            self.network.runs.clear()  # copies in another precision; they are made again
            self.model.to(device)

    def preprocess(self, images: List[Tensor], preprocessing: Preprocessing) -> Tensor:
        """(N, C, H, W): images in the student's format, normalised and padded for the teacher.

        Raises:
            ConfigError: see :func:`convert_channel_order`.
        """
        wanted = self.preprocessing.input_format
        images = convert_channel_order(images, preprocessing.input_format, wanted)
        return self.model.preprocess_image([{"image": image} for image in images]).tensor
