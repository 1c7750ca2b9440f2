"""Compares a student with its teacher: levels, adapters, heads, losses, weights.

The values in the order in which they are computed:

    student, teacher   Dict[str, Tensor]              level -> (N, C, H, W)
    terms              Dict[str, Dict[str, Tensor]]   loss -> level -> scalar, not weighted
    losses             Dict[str, Tensor]              "<loss>_kd_loss" -> scalar, weighted
"""

import logging
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ssimkd.config import check_has_keys
from ssimkd.errors import ConfigError, as_config_error
from ssimkd.losses import KD_LOSS_REGISTRY, Context, KDLoss, build_loss
from ssimkd.ssim.normalize import as_float
from ssimkd.teacher.frozen import Teacher
from ssimkd.teacher.heads import (
    CHANNELS,
    NAMES,
    Facts,
    box_predictors,
    check_has,
    check_heads,
    describe_heads,
)
from ssimkd.teacher.preprocessing import Preprocessing
from ssimkd.teacher.spec import TeacherSpec
from ssimkd.utils.validate import check_coefficients

from .late_log import LateLog
from .levels import check_channels, check_levels, match_cells, match_levels, select_levels
from .predictions import HeadOutputs, Predictions, pair_predictions
from .schedule import Schedule

logger = logging.getLogger(__name__)
# The arguments of a Distiller that MODEL.DISTILL itself holds, in capitals.
OPTIONS = (
    *("in_features", "level_weights", "adapter", "mask_padding"),
    *("warmup_iters", "cooldown_iters", "stop_iter"),
)
Maps = Dict[str, Tensor]
Terms = Dict[str, Dict[str, Tensor]]


class Captured(NamedTuple):
    """A batch on which a student's backbone has run.

    Attributes:
        records (list[dict]): what the student was given.
        maps (dict[str, Tensor]): level -> (N, C, H, W), what its backbone returned.
        images (Tensor): (N, 3, H, W), what its backbone was given.
        preprocessing (Preprocessing): how the student made `images` of `records`.
    """

    records: List[Dict]
    maps: Maps
    images: Tensor
    preprocessing: Preprocessing


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
        warmup_iters, cooldown_iters, stop_iter (int): see :class:`Schedule`.
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
        cooldown_iters: int = 0,
        stop_iter: int = 0,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.schedule = Schedule(warmup_iters, cooldown_iters, stop_iter)
        check_coefficients(**{"MODEL.DISTILL.TEACHER.LOSS_WEIGHT": loss_weight})
        if adapter not in ("none", "conv1x1"):
            raise ConfigError(f"MODEL.DISTILL.ADAPTER must be none or conv1x1, got {adapter!r}")
        for loss in losses:
            if not isinstance(loss, KDLoss):
                raise ConfigError(
                    "MODEL.DISTILL.LOSSES: an entry is a loss such as L(SSIMLoss)(weight=4.0), or "
                    f"SSIMLoss() outside of a LazyConfig, got {loss!r}"
                )
        self.losses: Any = nn.ModuleDict({loss.name: loss for loss in losses})
        if len(self.losses) < len(losses):
            raise ConfigError("MODEL.DISTILL.LOSSES names a loss twice")
        self.compares_maps = any(loss.of_maps for loss in losses)
        if self.compares_maps and not in_features:
            raise ConfigError(
                "MODEL.DISTILL.IN_FEATURES is empty: name levels, or set LOSSES to ()"
            )
        self.level_weights = check_levels(in_features, level_weights)
        with as_config_error("MODEL.DISTILL.TEACHER", TypeError):  # an argument does not exist
            self.spec = teacher if isinstance(teacher, TeacherSpec) else TeacherSpec(**teacher)
        self.in_features = list(in_features)
        self.adapter = adapter
        self.mask_padding = mask_padding
        self.loss_weight = float(loss_weight)
        self.adapters = nn.ModuleDict()
        self.student_heads: Dict[str, Facts] = {}
        self.stages = 1  # of the student's box head
        self.strides: Dict[str, int] = {}  # of all levels of the student
        self.student_shapes: Dict[str, ShapeSpec] = {}
        self.teacher_levels: Dict[str, str] = {}  # level of the student -> level of the teacher
        self.teacher: Optional[Teacher] = None
        self.log = LateLog()  # of the values by level

    @classmethod
    def from_config(cls, cfg) -> Dict[str, Any]:
        """Constructor arguments from `cfg.MODEL.DISTILL`."""
        check_has_keys(cfg)
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

    def active(self, iteration: int) -> bool:
        """Whether there is anything to distil in this iteration."""
        return self.enabled and not self.schedule.ended(iteration)

    @property
    def takes_unlabeled(self) -> bool:
        """Whether a loss compares the maps of images without labels."""
        return any(loss.learns_without_labels for loss in self.losses.values())

    @property
    def kinds(self) -> List[str]:
        """The kinds of the student's heads whose predictions the losses compare."""
        wanted = [kind for loss in self.losses.values() for kind in loss.compares]
        return [kind for kind in dict.fromkeys(wanted) if kind in self.student_heads]

    @property
    def layer(self) -> int:
        """After how many convolutions of the student's head its features are passed to the
        teacher's head (CrossKD); 0: never.
        """
        return max((loss.layer for loss in self.losses.values()), default=0)

    def attach(
        self,
        student_shapes: Dict[str, ShapeSpec],
        num_classes: int = 0,
        detector: Any = None,
    ) -> None:
        """Makes the adapters and the trainable parts of the losses.

        Args:
            student_shapes (dict[str, ShapeSpec]): the levels of the student's backbone.
            num_classes (int): object classes that the student's head predicts; 0: not known.
            detector (nn.Module or None): the student, for losses that compare its heads.

        Raises:
            ConfigError: the student lacks a level, or a head that a loss compares.
        """
        if not self.enabled:
            return
        if not all(loss.of_maps for loss in self.losses.values()):
            self.student_heads = describe_heads(detector)
            self.stages = len(box_predictors(detector))
        self.strides = {level: shape.stride for level, shape in student_shapes.items()}
        for loss in self.losses.values():
            check_compared(loss, self.student_heads)
        if not self.compares_maps:
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

    def build_teacher(self, device: torch.device, class_names: Sequence[str] = ()) -> None:
        """Builds and loads the teacher.

        Args:
            device (torch.device): where it starts.
            class_names (sequence[str]): those of the student's training data; (): not known.

        Raises:
            ConfigError: it cannot be built, or its levels or heads do not fit the student's.
        """
        if not self.enabled:
            return
        teacher = Teacher(self.spec, device, self.kinds, self.stages)
        for loss in self.losses.values():
            kinds = [kind for kind in loss.compares if kind in self.student_heads]
            names = class_names, teacher.class_names
            check_heads(loss.name, kinds, self.student_heads, teacher.heads, names)
        if self.compares_maps:
            self.teacher_levels = self._match_levels(teacher)
        self.teacher = teacher

    def _match_levels(self, teacher: Teacher) -> Dict[str, str]:
        """Level of the student -> level of the teacher; ConfigError if they cannot be compared."""
        if self.adapter != "none" and not self.adapters:
            raise ConfigError(
                "MODEL.DISTILL.TEACHER.CONFIG could not be read when the student was built, so it "
                "has no adapters: build the student again"
            )
        matched = match_levels(self.student_shapes, teacher.shapes)
        if self.adapter == "none":
            check_channels(self.student_shapes, teacher.shapes, matched)
        return matched

    def forward(
        self,
        labeled: Captured,
        outputs: Optional[HeadOutputs] = None,
        unlabeled: Optional[Captured] = None,
    ) -> Dict[str, Tensor]:
        """The weighted losses of one batch. Their values by level go to the event storage, later if
        a GPU computes them; see :class:`LateLog`.

        Args:
            labeled (Captured): the images from which the detector learns.
            outputs (HeadOutputs or None): of its heads for them, for the losses that compare heads.
            unlabeled (Captured or None): images without labels. Each image counts the same in the
                losses of maps that need no boxes.

        Returns:
            dict[str, Tensor]: "<loss>_kd_loss" -> scalar; 0 from `stop_iter` on, when the teacher
            is not run and lies in the CPU's memory.

        Raises:
            ConfigError: see :meth:`build_teacher` and :meth:`match`.
        """
        iteration = get_event_storage().iter
        if not self.active(iteration):
            if iteration == self.schedule.stop:
                logger.info("The distillation has ended (STOP_ITER): its losses are 0 from now on")
            return self._ended(labeled.images.device)
        student, teacher, *predictions = self.match(labeled, outputs)
        terms = self.compare(student, teacher, labeled.records, iteration, predictions)
        if unlabeled is not None and self.takes_unlabeled:
            student, teacher, *_ = self.match(unlabeled)
            more = self.compare(student, teacher, unlabeled.records, iteration, labeled=False)
            terms = average_terms((terms, len(labeled.records)), (more, len(unlabeled.records)))
        self.log.put(
            {f"{name}_kd/{level}": x for name, by in terms.items() for level, x in by.items()}
        )
        common = self.loss_weight * self.schedule.factor(iteration)
        losses = {}
        for loss in self.losses.values():
            levels = terms[loss.name].items()
            weighted = [self.level_weights.get(level, 1.0) * value for level, value in levels]
            losses[f"{loss.name}_kd_loss"] = loss.weight * common * torch.stack(weighted).sum()
        return losses

    def _ended(self, device: torch.device) -> Dict[str, Tensor]:
        """Losses of 0. DistributedDataParallel needs a gradient of every parameter all the same."""
        if self.teacher is not None:
            self.teacher.move(torch.device("cpu"))  # its next call, for pictures, moves it back
        nothing = [0.0 * parameter.sum() for parameter in self.parameters()]
        zero = torch.stack([torch.zeros((), device=device), *nothing]).sum()
        return {f"{loss.name}_kd_loss": zero for loss in self.losses.values()}

    def match(
        self, batch: Captured, outputs: Optional[HeadOutputs] = None
    ) -> Tuple[Maps, Maps, Predictions, Predictions]:
        """Runs the teacher and the adapters.

        Args:
            batch (Captured): images with labels or without.
            outputs (HeadOutputs or None): see :meth:`forward`.

        Returns:
            (dict, dict): the maps of student and teacher, level of the student -> (N, C, H, W), of
            equal shapes, each in the precision in which its detector made it.
            (dict, dict): what their heads predict; see :func:`pair_predictions`.

        Raises:
            ConfigError: a map does not have one cell per stride.
        """
        records, student_maps, images, preprocessing = batch
        if self.teacher is None:
            self.build_teacher(images.device)
        assert self.teacher is not None
        teacher_maps, teacher_size = self.teacher(records, images, preprocessing)
        height, width = images.shape[-2:]
        student, teacher = {}, {}
        predictions: Tuple[Predictions, Predictions] = {}, {}
        for level, name in self.teacher_levels.items():
            student[level], teacher[level] = match_cells(
                (level, student_maps[level], (height, width)),
                (name, teacher_maps[name], teacher_size),
                self.student_shapes[level].stride,
            )
            if level in self.adapters:
                student[level] = self.adapters[level](student[level])
        if outputs is not None and self.kinds:
            context = self.context(records)
            maps = {name: as_float(x) for name, x in teacher_maps.items()}  # as its heads are
            with torch.autocast(images.device.type, enabled=False):
                predictions = pair_predictions(
                    outputs, self.teacher.model, maps, self.kinds, context, self.layer
                )
        return (student, teacher, *predictions)

    def context(self, batched_inputs: List[Dict], iteration: int = 0) -> Context:
        """What the losses need of a batch besides its maps."""
        has_targets = all("instances" in x for x in batched_inputs)
        return Context(
            image_sizes=[tuple(x["image"].shape[-2:]) for x in batched_inputs],
            strides=self.strides,
            targets=[x["instances"] for x in batched_inputs] if has_targets else None,
            mask_padding=self.mask_padding,
            iteration=iteration,
        )

    def compare(
        self,
        student: Maps,
        teacher: Maps,
        batched_inputs: List[Dict],
        iteration: int = 0,
        predictions: Sequence[Predictions] = (),
        *,
        labeled: bool = True,
    ) -> Terms:
        """Each loss by level, not weighted.

        Args:
            student, teacher (dict[str, Tensor]): what :meth:`match` returns.
            batched_inputs (list[dict]): the batch that they belong to.
            iteration (int): of the training, from 0.
            predictions (sequence[dict]): of student and teacher, as :meth:`match` returns them;
                (): the losses of maps alone.
            labeled (bool): False: the losses of maps that need no boxes alone.
        """
        context = self.context(batched_inputs, iteration)
        assert self.teacher is not None
        terms = {}
        with torch.autocast(self.teacher.device.type, enabled=False):
            for loss in self.losses.values():
                if not (labeled or loss.learns_without_labels):
                    continue
                if loss.of_maps:
                    terms[loss.name] = loss(student, teacher, context)
                elif predictions:
                    terms[loss.name] = loss(*predictions, context)
        return terms


def average_terms(*batches: Tuple[Terms, int]) -> Terms:
    """The terms of several batches, each with its number of images, as those of one batch.

    A loss that some of the batches lack is averaged over the others.
    """
    averaged: Terms = {}
    for loss in batches[0][0]:
        own = [(terms[loss], images) for terms, images in batches if loss in terms]
        total = sum(images for _, images in own)
        averaged[loss] = {
            part: torch.stack([terms[part] * (images / total) for terms, images in own]).sum()
            for part in own[0][0]
        }
    return averaged


def check_compared(loss: KDLoss, heads: Dict[str, Facts]) -> None:
    """Raises ConfigError if a student has no head that a loss compares, or not enough layers."""
    if loss.of_maps:
        return
    if not set(loss.compares) & set(heads):
        wanted = " or ".join(dict.fromkeys(NAMES[kind] for kind in loss.compares))
        raise ConfigError(
            f"MODEL.DISTILL.LOSSES: {loss.name} compares the predictions of {wanted}, and the "
            "student has none"
        )
    for kind in set(loss.compares) & set(heads):
        check_has(loss.name, kind, "student", heads)
    convolutions = len(heads.get("cross", {}).get(CHANNELS, ()))
    if loss.layer > convolutions and "cross" in loss.compares:
        raise ConfigError(
            f"MODEL.DISTILL.{loss.name.upper()}.LAYER is {loss.layer}, and the student's head has "
            f"{convolutions} convolutions"
        )
