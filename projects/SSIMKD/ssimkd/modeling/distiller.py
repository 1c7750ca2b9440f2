"""Adapters and losses over the levels that teacher and student share."""

import logging
import math
from typing import (
    Any,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
    cast,
)

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ssimkd.errors import ConfigError, wrong_input
from ssimkd.losses import KD_LOSS_REGISTRY, Context, KDLoss, build_loss
from ssimkd.teacher.frozen import Preprocessing, Teacher
from ssimkd.teacher.spec import TeacherSpec

from .distiller_options import check_level_weights, check_names, check_values
from .levels import as_float, check_cells, crop_to_common, match_levels

logger = logging.getLogger(__name__)
# Arguments of a Distiller that stand, in capitals, in MODEL.DISTILL itself.
OPTIONS = (
    "in_features", "level_weights", "adapter", "mask_padding", "warmup_iters", "inherit",
    "check_images", "log_gradients", "skip_nonfinite_steps",
)  # fmt: skip


class Distiller(nn.Module):
    """Compares a student's maps with its teacher's.

    Its parameters are the adapters' and the losses' own; the teacher is no submodule and is built
    by :meth:`build_teacher`, at the latest by the first call.

    Args:
        teacher (TeacherSpec or mapping): see :class:`TeacherSpec`.
        losses (sequence[KDLoss]): each is one entry of the training losses; none: no distillation.
        in_features (sequence[str]): levels of the student, matched to the teacher's by stride.
        level_weights (sequence[float]): factor of each level's part of every loss, in the order of
            `in_features`; empty: 1.
        adapter (str): "none" or "conv1x1", a convolution to the teacher's channels per level.
        mask_padding (bool): leave out the cells that only pad an image to its batch's size.
        warmup_iters (int): iterations over which the weights grow linearly from 0.
        loss_weight (float): factor of all losses, to balance several teachers.
        inherit (sequence[str]): modules of the student that start from the teacher's weights, see
            `inherit.py`.
        check_images (int): training images on which teacher and student are checked before the
            first iteration, see `preflight.py`; 0: no check.
        log_gradients (int): iterations between logs of how hard the losses pull, see `balance.py`;
            0: none.
        skip_nonfinite_steps (int): steps with NaN or infinity that a run leaves out before it
            stops, see `finite.py`.

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
        inherit: Sequence[str] = (),
        check_images: int = 8,
        log_gradients: int = 0,
        skip_nonfinite_steps: int = 0,
    ) -> None:
        super().__init__()
        check_values(
            mask_padding,
            loss_weight,
            warmup_iters=warmup_iters,
            check_images=check_images,
            log_gradients=log_gradients,
            skip_nonfinite_steps=skip_nonfinite_steps,
        )
        check_names(adapter, losses, in_features, inherit)
        try:
            self.spec = teacher if isinstance(teacher, TeacherSpec) else TeacherSpec(**teacher)
        except TypeError as error:
            raise ConfigError(f"MODEL.DISTILL.TEACHER: {error}") from error
        self.losses = nn.ModuleDict({loss.name: loss for loss in losses})
        self.in_features = list(in_features)
        self.level_weights = check_level_weights(level_weights, in_features)
        self.adapter = adapter
        self.mask_padding = mask_padding
        self.warmup_iters = warmup_iters
        self.loss_weight = float(loss_weight)
        self.inherit = list(inherit)
        self.check_images = check_images
        self.log_gradients = log_gradients
        self.skip_nonfinite_steps = skip_nonfinite_steps
        self.name = ""  # of the teacher, where there are several
        self.adapters = nn.ModuleDict()
        self.student_shapes: Dict[str, ShapeSpec] = {}
        self.teacher_levels: Dict[str, str] = {}
        self.teacher: Optional[Teacher] = None

    @classmethod
    def from_config(cls, cfg) -> Dict[str, Any]:
        """Constructor arguments from `cfg.MODEL.DISTILL`."""
        if "DISTILL" not in cfg.MODEL:
            raise ConfigError("MODEL.DISTILL is missing: call ssimkd.add_ssimkd_config(cfg) first")
        node = cfg.MODEL.DISTILL
        for name, _ in KD_LOSS_REGISTRY:
            if name.upper() in node:
                build_loss(name, node)  # a wrong setting is wrong whether it is used or not
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

    def named(self) -> Iterator[Tuple[str, "Distiller"]]:
        """As :meth:`Distillers.named`: one pair, of the teacher's name and this distiller.

        The name is "" where this teacher is the only one.
        """
        yield self.name, self

    def attach(self, student_shapes: Dict[str, ShapeSpec], num_classes: int = 0) -> None:
        """Fits this distiller to a student's backbone; makes the adapters.

        Args:
            student_shapes (dict[str, ShapeSpec]): level -> channels and stride.
            num_classes (int): object classes that the student's head predicts; 0: not known.

        Raises:
            ConfigError: the student lacks a level.
        """
        if not self.enabled:
            return
        for level in self.in_features:
            if level not in student_shapes:
                has = ", ".join(student_shapes)
                raise ConfigError(
                    f"MODEL.DISTILL.IN_FEATURES: the student has no {level}; it has {has}"
                )
        self.student_shapes = {level: student_shapes[level] for level in self.in_features}
        channels = {level: shape.channels for level, shape in self.student_shapes.items()}
        with torch.random.fork_rng(devices=[]):  # the detector's own draws stay the same
            if self.adapter != "none":
                try:
                    teacher_shapes = self.spec.output_shape()
                except ConfigError:
                    return  # nothing is trained without it; build_teacher says what is wrong
                for level, name in match_levels(self.student_shapes, teacher_shapes).items():
                    wide = teacher_shapes[name].channels
                    self.adapters[level] = nn.Conv2d(channels[level], wide, 1)
                    channels[level] = wide
            for loss in self._losses():
                with wrong_input():
                    loss.attach(channels, num_classes)

    def build_teacher(self, device: torch.device) -> None:
        """Builds, loads and checks the teacher.

        Raises:
            ConfigError: it cannot be built, or has no level of a student level's stride, or its
                channels differ and there is no adapter.
        """
        if not self.enabled:
            return
        teacher = Teacher(self.spec, device)
        if self.adapter != "none" and not self.adapters:
            raise ConfigError(
                "MODEL.DISTILL.TEACHER.CONFIG could not be read when the student was built, so "
                "that it has no adapters: build it again"
            )
        self.teacher_levels = match_levels(self.student_shapes, teacher.shapes)
        for level, name in self.teacher_levels.items():
            expected = teacher.shapes[name].channels
            found = self.student_shapes[level].channels
            if level in self.adapters:
                found = self.adapters[level].out_channels
            if found != expected:
                raise ConfigError(
                    f"MODEL.DISTILL.ADAPTER: {level} has {found} channels in the student and "
                    f"{expected} in the teacher; set it to conv1x1"
                )
        self.teacher = teacher

    def forward(
        self,
        batched_inputs: List[Dict],
        student_maps: Dict[str, Tensor],
        images: Tensor,
        rules: Preprocessing,
    ) -> Dict[str, Tensor]:
        """The weighted losses of one batch; per-level values go to the event storage.

        Args:
            batched_inputs (list[dict]): what the student was given.
            student_maps (dict[str, Tensor]): level -> (N, C, H, W), with gradient.
            images (Tensor): (N, 3, H, W), what the student's backbone was given.
            rules (Preprocessing): by which it was made of the images.

        Returns:
            dict[str, Tensor]: "<loss>_kd_loss" -> scalar.

        Raises:
            ConfigError: see :meth:`build_teacher`; or maps that do not agree cell by cell.
            FloatingPointError: NaN or infinity, with the level and whose it is; unless steps may
                be left out.
        """
        with torch.autocast(images.device.type, enabled=False):
            student, teacher = self.pair(batched_inputs, student_maps, images, rules)
            return self._compare(student, teacher, self._context(batched_inputs))

    def pair(
        self,
        batched_inputs: List[Dict],
        student_maps: Dict[str, Tensor],
        images: Tensor,
        rules: Preprocessing,
    ) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
        """The maps of student (after the adapter) and teacher, cell by cell; see :meth:`forward`.

        Returns:
            (dict, dict): level -> (N, C, H, W) in float32 or float64, equal shapes.
        """
        if self.teacher is None:
            self.build_teacher(images.device)
        assert self.teacher is not None
        teacher_maps, teacher_padded = self.teacher(batched_inputs, images, rules)
        height, width = images.shape[-2:]
        student, teacher = {}, {}
        for level, name in self.teacher_levels.items():
            stride = self.student_shapes[level].stride
            check_cells(f"the student's {level}", student_maps[level], stride, (height, width))
            check_cells(f"the teacher's {name}", teacher_maps[name], stride, teacher_padded)
            s, t = crop_to_common(as_float(student_maps[level]), as_float(teacher_maps[name]))
            student[level] = self.adapters[level](s) if level in self.adapters else s
            teacher[level] = t
        return student, teacher

    def _context(self, batched_inputs: List[Dict]) -> Context:
        has_targets = "instances" in batched_inputs[0]
        return Context(
            image_sizes=[tuple(x["image"].shape[-2:]) for x in batched_inputs],
            strides={level: shape.stride for level, shape in self.student_shapes.items()},
            targets=[x["instances"] for x in batched_inputs] if has_targets else None,
            mask_padding=self.mask_padding,
            iteration=get_event_storage().iter,
        )

    def _losses(self) -> Iterable[KDLoss]:
        return cast(Iterable[KDLoss], self.losses.values())

    def _compare(self, student, teacher, context: Context) -> Dict[str, Tensor]:
        storage = get_event_storage()
        ramp = min(1.0, (storage.iter + 1) / self.warmup_iters) if self.warmup_iters else 1.0
        weighted = {}
        for loss in self._losses():
            with wrong_input():
                terms = loss(student, teacher, context)
            values = torch.stack([term.detach() for term in terms.values()]).tolist()
            for level, value in zip(terms, values):
                if math.isfinite(value):
                    storage.put_scalar(f"{loss.name}_kd/{level}", value)
                else:
                    self._report_nonfinite(explain(loss.name, level, value, student, teacher))
            factor = loss.weight * self.loss_weight * ramp
            parts = [self.level_weights.get(part, 1.0) * term for part, term in terms.items()]
            weighted[f"{loss.name}_kd_loss"] = factor * torch.stack(parts).sum()
        return weighted

    def _report_nonfinite(self, text: str) -> None:
        text = f"{self.name}/{text}" if self.name else text  # as the event storage calls it
        if not self.skip_nonfinite_steps:
            raise FloatingPointError(text)
        logger.warning(text)  # the gradient tells the other processes, see `finite.py`


def explain(name: str, level: str, value: float, student, teacher) -> str:
    """One line that says where a value that is not finite comes from."""
    source = "the loss itself"
    for whose, maps in (("the student's map", student), ("the teacher's map", teacher)):
        if level in maps and not torch.isfinite(maps[level]).all():
            source = f"{whose} {level}, which holds NaN or infinity"
    return f"{name}_kd/{level} is {value}, from {source}"
