"""The detectors that learn from a teacher: Detectron2's own, plus the distillation losses."""

from contextlib import contextmanager
from functools import cached_property
from typing import Any, Dict, Iterator, Optional, Union

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
from ssimkd.engine.finite_steps import naming_place
from ssimkd.teacher.frozen import Preprocessing, preprocessing_of
from ssimkd.utils.compat import FCOS

from .distiller import Distiller
from .gradient_ratio import GradientRatio
from .several_teachers import Distillers, build_distiller


class DistillMixin:
    """Makes a meta-architecture with a `.backbone` that returns maps by level a student.

    The parent's forward runs as it is; the maps are taken while it does. Parameters keep the
    parent's names, those of the distillation alone begin with `distiller.`.

    Args:
        distiller (Distiller, Distillers or None): what compares the maps with the teacher's, or
            with several teachers'; None: the plain detector.
        kwargs: the parent's arguments.
    """

    backbone: Backbone
    training: bool

    @configurable
    def __init__(
        self, *, distiller: Optional[Union[Distiller, Distillers]] = None, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        if distiller is not None:
            num_classes = classes_in(getattr(self, "roi_heads", self))
            distiller.attach(self.backbone.output_shape(), num_classes)
        self.distiller = distiller

    @classmethod
    def from_config(cls, cfg) -> Dict[str, Any]:
        """The parent's arguments and the distiller of `cfg.MODEL.DISTILL`."""
        ret = super().from_config(cfg)  # type: ignore[misc]
        ret["distiller"] = build_distiller(cfg)
        if "input_format" not in ret:  # a parent that does not keep it
            ret["distiller"].student_format = cfg.INPUT.FORMAT
        return ret

    @cached_property
    def rules(self) -> Preprocessing:
        """How images are prepared; read once, because a GPU would be waited for."""
        return preprocessing_of(self, image_format_of(self))

    def forward(self, batched_inputs):
        """The parent's forward; in training its losses and "<loss>_kd_loss", already weighted."""
        if not (self.training and self.distiller is not None and self.distiller.enabled):
            return super().forward(batched_inputs)
        period = self.distiller.log_gradients
        watch = bool(period) and get_event_storage().iter % period == 0
        rules = self.rules._replace(input_format=image_format_of(self))
        with (
            capture_backbone(self.backbone, watch) as backbone,
            naming_place(batched_inputs, backbone),
        ):
            losses = super().forward(batched_inputs)
            kd_losses = self.distiller(batched_inputs, backbone["maps"], backbone["images"], rules)
        return {**losses, **kd_losses}


def image_format_of(detector: Any) -> str:
    """Channel order of a detector's images: BGR, Detectron2's own, where nothing says it.

    Not every student keeps one as `input_format`; its distiller knows that of a YAML config.
    """
    found: Any = getattr(detector, "input_format", None)
    return found or getattr(getattr(detector, "distiller", None), "student_format", "BGR")


@contextmanager
def capture_backbone(backbone: nn.Module, watch: bool = False) -> Iterator[Dict[str, Any]]:
    """Takes what a backbone returns while the block runs; afterwards nothing stays registered.

    Args:
        backbone (nn.Module): of the student.
        watch (bool): log the gradients at its maps, see `balance.py`.

    Yields:
        dict: filled by the backbone's run: "images", what it is given, (N, 3, H, W), and "maps",
        level -> (N, C, H, W).
    """
    taken: Dict[str, Any] = {}

    def take(module, inputs, output):
        taken.update(images=inputs[0], maps=output)
        if watch:
            balance = GradientRatio(output)
            taken["maps"] = balance.view("distiller")
            return balance.view("detector")
        return output

    handle = backbone.register_forward_hook(take)
    try:
        yield taken
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
        """FCOS as a student, in LazyConfig: Detectron2's FCOS has no YAML config."""


def __getattr__(name: str) -> Any:
    if name == "DistillFCOS":
        raise ImportError("the installed Detectron2 has no FCOS: it came with v0.6")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
