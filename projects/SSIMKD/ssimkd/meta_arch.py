"""The detectors that learn from a teacher: Detectron2's own, plus the distillation losses."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, GeneralizedRCNN
from torch import nn

from .distiller import Distiller


class DistillMixin:
    """Makes a meta-architecture with a `.backbone` that returns maps by level a student.

    The parent's forward runs as it is; the maps are taken while it does. Parameters keep the
    parent's names, those of the distillation alone begin with `distiller.`.

    Args:
        distiller (Distiller): what compares the maps with the teacher's.
        kwargs: the parent's arguments.
    """

    backbone: Backbone
    training: bool

    @configurable
    def __init__(self, *, distiller: Distiller, **kwargs) -> None:
        super().__init__(**kwargs)
        distiller.attach(self.backbone.output_shape())
        self.distiller = distiller

    @classmethod
    def from_config(cls, cfg) -> Dict[str, Any]:
        """The parent's arguments and the distiller of `cfg.MODEL.DISTILL`."""
        ret = super().from_config(cfg)  # type: ignore[misc]
        ret["distiller"] = Distiller(cfg)
        return ret

    def forward(self, batched_inputs):
        """The parent's forward; in training its losses and "<loss>_kd_loss", already weighted."""
        if not (self.training and self.distiller.enabled):
            return super().forward(batched_inputs)
        with output_of(self.backbone) as backbone:
            losses = super().forward(batched_inputs)
        image_format = getattr(self, "input_format", None) or "BGR"
        kd_losses = self.distiller(
            batched_inputs, backbone["maps"], backbone["padded_size"], image_format
        )
        return {**losses, **kd_losses}


@contextmanager
def output_of(backbone: nn.Module) -> Iterator[Dict[str, Any]]:
    """Takes what a backbone returns while the block runs; afterwards nothing stays registered.

    Yields:
        dict: filled by the backbone's run: "maps", level -> (N, C, H, W), and "padded_size",
        (height, width) of its input in pixels.
    """
    taken: Dict[str, Any] = {}

    def take(module, inputs, output):
        taken.update(maps=output, padded_size=tuple(inputs[0].shape[-2:]))

    handle = backbone.register_forward_hook(take)
    try:
        yield taken
    finally:
        handle.remove()


@META_ARCH_REGISTRY.register()
class DistillRCNN(DistillMixin, GeneralizedRCNN):
    """Faster, Mask, Cascade or Keypoint R-CNN as a student."""
