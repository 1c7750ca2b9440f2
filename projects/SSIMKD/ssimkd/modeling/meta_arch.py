"""The students: Detectron2's detectors, with the distillation losses beside their own.

A new student is a class of two lines, like those at the end of this file: it inherits from
DistillMixin and from a detector, and it is registered. A new backbone needs nothing here: every
backbone in Detectron2's BACKBONE_REGISTRY that returns maps by level can learn and teach.
"""

import logging
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from detectron2.config import configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    GeneralizedRCNN,
    PanopticFPN,
    RetinaNet,
)
from detectron2.utils.events import get_event_storage
from torch import nn

from ssimkd.data.datasets import classes_in
from ssimkd.errors import ConfigError
from ssimkd.teacher.preprocessing import Preprocessing, image_format_of, preprocessing_of
from ssimkd.utils.compat import FCOS
from ssimkd.utils.validate import check_integers

from .distiller import Captured, Distiller
from .gradient_ratio import GradientRatio
from .predictions import capture_heads
from .several_teachers import Distillers, build_distiller, build_teachers, distillers_of

logger = logging.getLogger(__name__)
OWN_LOOP = "build the student by ssimkd.build_student(cfg), or train by `ssimkd train`"


class DistillMixin:
    """Turns a detector whose `backbone` returns maps by level into a student.

    The detector's own forward runs unchanged, and the maps are taken while it runs. Parameters keep
    the detector's names. Parameters that only the distillation needs are below `distiller.`.

    A training batch may have images without labels, anywhere among the others: records without
    "instances". The detector's forward gets the other records alone.
    Backbone and teacher run on the images without labels as a batch of its own, so that neither
    kind is padded to the size of the other, and the detector's losses are the same as without them.

    Args:
        distiller (Distiller, Distillers or None): compares the maps with those of a teacher, or of
            several teachers. With None this is the plain detector.
        log_gradients (int): iterations between logs of :class:`GradientRatio`; 0: no logs.
        image_format (str): channel order of the images. It is only used for a detector that does
            not keep an `input_format` itself, such as FCOS.
        driver_keys (sequence[str]): settings that only `build_student` or a driver carries out. If
            there are any, the first training step raises ConfigError unless the teachers were built
            before.
        kwargs: the detector's own arguments.
    """

    backbone: Backbone
    training: bool

    @configurable
    def __init__(
        self,
        *,
        distiller: Optional[Union[Distiller, Distillers]] = None,
        log_gradients: int = 0,
        image_format: str = "BGR",
        driver_keys: Sequence[str] = (),
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if distiller is not None:
            num_classes = classes_in(getattr(self, "roi_heads", self))
            distiller.attach(self.backbone.output_shape(), num_classes, self)
        self.distiller = distiller
        check_integers(**{"MODEL.DISTILL.LOG_GRADIENTS": log_gradients})
        self.log_gradients = log_gradients
        self.report_gradients: Optional[Callable[[Dict[str, float]], None]] = None
        self.image_format = image_format
        self.driver_keys = list(driver_keys)

    @classmethod
    def from_config(cls, cfg) -> Dict[str, Any]:
        """The detector's own arguments, and those of this class from `cfg.MODEL.DISTILL`.

        Raises:
            ConfigError: the number of classes is to be taken from the data, and was not, or the
                detector's class is not configurable.
        """
        if cfg.DATASETS.get("NUM_CLASSES_FROM_DATA"):
            raise ConfigError(
                "DATASETS.NUM_CLASSES_FROM_DATA is True, and build_model(cfg) cannot count them: "
                f"{OWN_LOOP}"
            )
        if not hasattr(super(), "from_config"):
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE: {cls.plain_architecture().__name__} cannot be a student "
                "without a @configurable constructor and its from_config"
            )
        ret = super().from_config(cfg)  # type: ignore[misc]
        ret["distiller"] = build_distiller(cfg)
        ret["log_gradients"] = cfg.MODEL.DISTILL.LOG_GRADIENTS
        ret["image_format"] = cfg.INPUT.FORMAT
        node = cfg.MODEL.DISTILL
        entries = node.TEACHERS if node.LOSSES else []
        inherits = node.INHERIT or any(entry.get("INHERIT") for entry in entries)
        skips = node.SKIP_NONFINITE_STEPS
        keys = {"MODEL.DISTILL.INHERIT": inherits, "MODEL.DISTILL.SKIP_NONFINITE_STEPS": skips}
        ret["driver_keys"] = [key for key, is_set in keys.items() if is_set]
        return ret

    @classmethod
    def plain_architecture(cls) -> type:
        """The detector class that this student class extends, such as GeneralizedRCNN."""
        return next(base for base in cls.__mro__ if not issubclass(base, DistillMixin))

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared; read only once, because reading it has to wait for a GPU."""
        return preprocessing_of(self, image_format_of(self))

    def forward(self, batched_inputs):
        """The detector's own forward; in training, its losses and those of the distillation.

        Args:
            batched_inputs (list[dict]): as the detector takes it, and in training images without
                labels.

        Returns:
            In training dict[str, Tensor]: the detector's losses and, for each distillation loss,
            "<loss>_kd_loss", already weighted. Otherwise what the detector returns.
        """
        distiller = self.distiller
        if not self.training:
            return super().forward(batched_inputs)
        labeled, unlabeled = split_by_labels(batched_inputs)
        if distiller is None:
            return super().forward(labeled)
        if unlabeled and not any(one.takes_unlabeled for _, one in distillers_of(self)):
            warn_of_unlabeled()
        if not distiller.enabled:
            return super().forward(labeled)
        iteration = get_event_storage().iter
        active = [one for _, one in distillers_of(self) if one.active(iteration)]
        self._build_missing_teachers(active)
        log_gradients = self.log_gradients and iteration % self.log_gradients == 0
        ratio = None
        if log_gradients or self.report_gradients:
            ratio = GradientRatio(bool(log_gradients), self.report_gradients)
        kinds = [kind for one in active for kind in one.kinds]
        layers = {one.layer for one in active if one.layer}
        maps = capture_backbone(self.backbone, ratio)
        with maps as captured, capture_heads(self, kinds, layers, ratio) as outputs:
            losses = super().forward(labeled)
        more = None
        if unlabeled and any(one.takes_unlabeled for one in active):
            with capture_backbone(self.backbone, ratio) as alone:
                self.backbone(self.preprocess_image(unlabeled).tensor)
            more = Captured(unlabeled, **alone, preprocessing=self.preprocessing)
        batch = Captured(labeled, **captured, preprocessing=self.preprocessing)
        return {**losses, **distiller(batch, outputs, more)}

    def _build_missing_teachers(self, active: List[Distiller]) -> None:
        if any(one.teacher is None for one in active):
            if self.driver_keys:
                raise ConfigError(
                    f"{' and '.join(self.driver_keys)}: build_model(cfg) ignores this setting: "
                    f"{OWN_LOOP}"
                )
            logger.warning(
                "The teacher is built now, in the first training step. INHERIT and data sets of "
                "DATASETS.COCO need ssimkd.build_student(cfg) in place of build_model(cfg); only "
                "`ssimkd train` acts on CHECK_IMAGES, SKIP_NONFINITE_STEPS and UNLABELED"
            )
            build_teachers(self)


@cache  # once
def warn_of_unlabeled() -> None:
    """Warns that a batch has images from which nothing learns."""
    logger.warning(
        'Training images without "instances" are left out: no loss of MODEL.DISTILL.LOSSES learns '
        "from images without labels. A mapper should give an image without objects empty instances"
    )


def split_by_labels(batch: List[Dict]) -> Tuple[List[Dict], List[Dict]]:
    """The records of a batch that have "instances", and those that do not, each in their order.

    A batch in which no record has them is not split: its detector learns from something else.
    """
    labeled = [x for x in batch if "instances" in x]
    return (labeled, [x for x in batch if "instances" not in x]) if labeled else (batch, [])


@contextmanager
def capture_backbone(
    backbone: nn.Module, ratio: Optional[GradientRatio] = None
) -> Iterator[Dict[str, Any]]:
    """Keeps what a backbone is given and returns while the block runs.

    Args:
        backbone (nn.Module): of the student. Its hook is removed after the block.
        ratio (GradientRatio or None): measures the two gradients at the maps.

    Yields:
        dict: once the backbone has run, "images", (N, 3, H, W), and "maps", level -> (N, C, H, W).
    """
    captured: Dict[str, Any] = {}

    def keep(module, inputs, maps):
        captured.update(images=inputs[0], maps=maps)
        if ratio is not None:
            maps, captured["maps"] = ratio.split_maps(maps)
        return maps

    handle = backbone.register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()


@META_ARCH_REGISTRY.register()
class DistillRCNN(DistillMixin, GeneralizedRCNN):
    """Faster, Mask, Cascade or Keypoint R-CNN as a student."""


@META_ARCH_REGISTRY.register()
class DistillPanopticFPN(DistillMixin, PanopticFPN):
    """Panoptic FPN as a student."""


@META_ARCH_REGISTRY.register()
class DistillRetinaNet(DistillMixin, RetinaNet):
    """RetinaNet as a student."""


if FCOS is not None:

    class DistillFCOS(DistillMixin, FCOS):
        """FCOS as a student, in LazyConfig only: Detectron2's FCOS has no YAML config."""


def __getattr__(name: str) -> Any:
    if name == "DistillFCOS":
        raise ImportError("the installed Detectron2 has no FCOS: it came with v0.6")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
