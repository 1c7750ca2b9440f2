"""Compares a student's maps with its teacher's: levels, adapters, losses, weights.

The values in the order in which they are computed:

    student, teacher   Dict[str, Tensor]              level -> (N, C, H, W)
    terms              Dict[str, Dict[str, Tensor]]   loss -> level -> scalar, not weighted
    losses             Dict[str, Tensor]              "<loss>_kd_loss" -> scalar, weighted
"""

import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ssimkd.errors import ConfigError, as_config_error
from ssimkd.losses import KD_LOSS_REGISTRY, Context, KDLoss, build_loss
from ssimkd.teacher.frozen import Teacher
from ssimkd.teacher.preprocessing import Preprocessing
from ssimkd.teacher.spec import TeacherSpec
from ssimkd.utils.validate import check_coefficients, check_integers

from .levels import check_channels, check_levels, match_cells, match_levels, select_levels

# The arguments of a Distiller that MODEL.DISTILL itself holds, in capitals.
OPTIONS = ("in_features", "level_weights", "adapter", "mask_padding", "warmup_iters")
Maps = Dict[str, Tensor]
Terms = Dict[str, Dict[str, Tensor]]


class Distiller(nn.Module):
    """Computes the distillation losses of a student and one teacher.

    Its parameters are those of the adapters and of the losses. The teacher is not a submodule. It
    is built by :meth:`build_teacher`, at the latest when maps are first compared.

    Args:
        teacher (TeacherSpec or mapping): see :class:`TeacherSpec`.
        losses (sequence[KDLoss]): each is one entry of the training losses; none: no distillation.
        in_features (sequence[str]): levels of the student. Each is compared with the teacher's
            level of the same stride.
        level_weights (sequence[float]): factor of each level in every loss, in the order of
            `in_features`; empty: 1.
        adapter (str): "none" or "conv1x1", a convolution to the teacher's channels for each level.
        mask_padding (bool): leave out the cells that only pad an image to the size of its batch.
        warmup_iters (int): iterations over which the weights grow linearly from 0.
        loss_weight (float): factor of all losses, to balance several teachers.

    Raises:
        ConfigError: an option is unknown or out of its range.
    """

    @configurable
    def __init__(
        self,
        *,
        teacher: Union[TeacherSpec, Mapping[str, Any]],
        losses: Sequence[KDLoss],
        in_features: Sequence[str] = ("p2", "p3", "p4", "p5", "p6"),
        level_weights: Sequence[float] = (),
        adapter: str = "none",
        mask_padding: bool = True,
        warmup_iters: int = 0,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_integers(**{"MODEL.DISTILL.WARMUP_ITERS": warmup_iters})
        check_coefficients(**{"MODEL.DISTILL.TEACHER.LOSS_WEIGHT": loss_weight})
        if adapter not in ("none", "conv1x1"):
            raise ConfigError(f"MODEL.DISTILL.ADAPTER: {adapter!r} is none of none, conv1x1")
        self.losses: Any = nn.ModuleDict({loss.name: loss for loss in losses})
        if len(self.losses) < len(losses):
            raise ConfigError("MODEL.DISTILL.LOSSES names a loss twice")
        self.level_weights = check_levels(in_features, level_weights)
        with as_config_error("MODEL.DISTILL.TEACHER", TypeError):  # an argument does not exist
            self.spec = teacher if isinstance(teacher, TeacherSpec) else TeacherSpec(**teacher)
        self.in_features = list(in_features)
        self.adapter = adapter
        self.mask_padding = mask_padding
        self.warmup_iters = warmup_iters
        self.loss_weight = float(loss_weight)
        self.adapters = nn.ModuleDict()
        self.student_shapes: Dict[str, ShapeSpec] = {}
        self.teacher_levels: Dict[str, str] = {}  # level of the student -> level of the teacher
        self.teacher: Optional[Teacher] = None

    @classmethod
    def from_config(cls, cfg) -> Dict[str, Any]:
        """Constructor arguments from `cfg.MODEL.DISTILL`."""
        if "DISTILL" not in cfg.MODEL:
            raise ConfigError("MODEL.DISTILL is missing: call ssimkd.add_ssimkd_config(cfg) first")
        node = cfg.MODEL.DISTILL
        for name, _ in KD_LOSS_REGISTRY:
            if name.upper() in node:
                build_loss(name, node)  # a wrong setting is an error even where it is not used
        spec = {key.lower(): value for key, value in node.TEACHER.items()}
        return {
            **{option: node[option.upper()] for option in OPTIONS},
            "loss_weight": spec.pop("loss_weight"),
            "teacher": TeacherSpec(**spec),
            "losses": [build_loss(name, node) for name in node.LOSSES],
        }

    @property
    def enabled(self) -> bool:
        """Whether there is anything to distil."""
        return len(self.losses) > 0

    def attach(self, student_shapes: Dict[str, ShapeSpec], num_classes: int = 0) -> None:
        """Makes the adapters and the trainable parts of the losses.

        Args:
            student_shapes (dict[str, ShapeSpec]): the levels of the student's backbone.
            num_classes (int): object classes that the student's head predicts; 0: not known.

        Raises:
            ConfigError: the student lacks a level.
        """
        if not self.enabled:
            return
        self.student_shapes = select_levels(student_shapes, self.in_features)
        channels = {level: shape.channels for level, shape in self.student_shapes.items()}
        with torch.random.fork_rng(devices=[]):  # the detector's random numbers stay the same
            if self.adapter != "none":
                try:
                    teacher_shapes = self.spec.output_shape()
                except ConfigError:
                    return  # inference needs no teacher, and build_teacher says what is wrong
                for level, name in match_levels(self.student_shapes, teacher_shapes).items():
                    teacher_channels = teacher_shapes[name].channels
                    self.adapters[level] = nn.Conv2d(channels[level], teacher_channels, 1)
                    channels[level] = teacher_channels
            for loss in self.losses.values():
                loss.attach(channels, num_classes)

    def build_teacher(self, device: torch.device) -> None:
        """Builds and loads the teacher.

        Raises:
            ConfigError: it cannot be built, or its levels do not fit the student's.
        """
        if not self.enabled:
            return
        teacher = Teacher(self.spec, device)
        if self.adapter != "none" and not self.adapters:
            raise ConfigError(
                "MODEL.DISTILL.TEACHER.CONFIG could not be read when the student was built, so it "
                "has no adapters: build the student again"
            )
        self.teacher_levels = match_levels(self.student_shapes, teacher.shapes)
        if self.adapter == "none":
            check_channels(self.student_shapes, teacher.shapes, self.teacher_levels)
        self.teacher = teacher

    def forward(
        self,
        batched_inputs: List[Dict],
        student_maps: Maps,
        images: Tensor,
        preprocessing: Preprocessing,
    ) -> Dict[str, Tensor]:
        """The weighted losses of one batch. Their values by level go to the event storage.

        Args:
            batched_inputs (list[dict]): what the student was given.
            student_maps (dict[str, Tensor]): level -> (N, C, H, W), what its backbone returned.
            images (Tensor): (N, 3, H, W), what its backbone was given.
            preprocessing (Preprocessing): how the student made `images` of `batched_inputs`.

        Returns:
            dict[str, Tensor]: "<loss>_kd_loss" -> scalar.

        Raises:
            ConfigError: see :meth:`build_teacher` and :meth:`match_maps`.
        """
        iteration = get_event_storage().iter
        student, teacher = self.match_maps(batched_inputs, student_maps, images, preprocessing)
        terms = self.compare(student, teacher, batched_inputs, iteration)
        log_terms(terms)
        ramp = min(1.0, (iteration + 1) / self.warmup_iters) if self.warmup_iters else 1.0
        losses = {}
        for loss in self.losses.values():
            levels = terms[loss.name].items()
            weighted = [self.level_weights.get(level, 1.0) * value for level, value in levels]
            factor = loss.weight * self.loss_weight * ramp
            losses[f"{loss.name}_kd_loss"] = factor * torch.stack(weighted).sum()
        return losses

    def match_maps(
        self,
        batched_inputs: List[Dict],
        student_maps: Maps,
        images: Tensor,
        preprocessing: Preprocessing,
    ) -> Tuple[Maps, Maps]:
        """Runs the teacher and the adapters; the arguments are those of :meth:`forward`.

        Returns:
            (dict, dict): the maps of student and teacher, level of the student -> (N, C, H, W), of
            equal shapes, in float32 or float64.

        Raises:
            ConfigError: a map does not have one cell per stride.
        """
        if self.teacher is None:
            self.build_teacher(images.device)
        assert self.teacher is not None
        with torch.autocast(images.device.type, enabled=False):
            teacher_maps, teacher_size = self.teacher(batched_inputs, images, preprocessing)
            height, width = images.shape[-2:]
            student, teacher = {}, {}
            for level, name in self.teacher_levels.items():
                student[level], teacher[level] = match_cells(
                    (level, student_maps[level], (height, width)),
                    (name, teacher_maps[name], teacher_size),
                    self.student_shapes[level].stride,
                )
                if level in self.adapters:
                    student[level] = self.adapters[level](student[level])
        return student, teacher

    def compare(
        self, student: Maps, teacher: Maps, batched_inputs: List[Dict], iteration: int = 0
    ) -> Terms:
        """Each loss by level, not weighted.

        Args:
            student, teacher (dict[str, Tensor]): what :meth:`match_maps` returns.
            batched_inputs (list[dict]): the batch that they belong to.
            iteration (int): of the training, from 0.
        """
        has_targets = "instances" in batched_inputs[0]
        context = Context(
            image_sizes=[tuple(x["image"].shape[-2:]) for x in batched_inputs],
            strides={level: shape.stride for level, shape in self.student_shapes.items()},
            targets=[x["instances"] for x in batched_inputs] if has_targets else None,
            mask_padding=self.mask_padding,
            iteration=iteration,
        )
        device = next(iter(student.values())).device
        with torch.autocast(device.type, enabled=False):
            return {loss.name: loss(student, teacher, context) for loss in self.losses.values()}


def log_terms(terms: Terms) -> None:
    """Puts `<loss>_kd/<level>` into the event storage, where it is finite."""
    values = {f"{loss}_kd/{level}": x for loss, by in terms.items() for level, x in by.items()}
    numbers = torch.stack([value.detach() for value in values.values()]).tolist()
    for name, number in zip(values, numbers):
        if math.isfinite(number):
            get_event_storage().put_scalar(name, number)
