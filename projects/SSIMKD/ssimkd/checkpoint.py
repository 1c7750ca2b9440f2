"""Checkpoints of teachers, of every kind that Detectron2 reads, without a silent gap."""

import logging
from collections import OrderedDict
from typing import Any, List

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from .errors import ConfigError, one_line

logger = logging.getLogger(__name__)


class _WholeBackbone(DetectionCheckpointer):
    """Loads a checkpoint and raises unless it covers the backbone; the heads may differ.

    Attributes:
        absent (list[str]): tensors of the heads that keep their random values.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.absent: List[str] = []

    def _load_model(self, checkpoint):
        weights = checkpoint["model"]
        if not hasattr(weights, "_metadata") and any(k.endswith("running_var") for k in weights):
            # Without a version FrozenBN takes 0 and 1 for statistics that a file lacks. That is
            # right for a file without any, such as Caffe2's, whose scale and bias hold them.
            checkpoint["model"] = weights = OrderedDict(weights)
            weights._metadata = {
                name: {"version": module._version}
                for name, module in self.model.named_modules()
                if isinstance(module, FrozenBatchNorm2d)
            }
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible) -> None:
        wrong = {name: f"{name} is missing" for name in incompatible.missing_keys}
        wrong.update(
            (name, f"{name} is {tuple(found)} instead of {tuple(expected)}")
            for name, found, expected in incompatible.incorrect_shapes
        )
        # counters of training steps have no effect on a frozen network
        wrong = {k: v for k, v in wrong.items() if not k.endswith("num_batches_tracked")}
        backbone = [text for name, text in wrong.items() if name.startswith("backbone.")]
        if backbone:
            more = f" and {len(backbone) - 3} more" if len(backbone) > 3 else ""
            raise ConfigError(
                f"does not fit the backbone of its config: {'; '.join(backbone[:3])}{more}"
            )
        # a teacher that was a student itself needs nothing of its own teacher's
        self.absent = [name for name in wrong if not name.startswith("distiller.")]


def load_teacher(model: Any, weights: str, key: str = "MODEL.DISTILL.TEACHER.WEIGHTS") -> List[str]:
    """Loads a checkpoint that must hold the whole backbone.

    Args:
        model (nn.Module): a detector with a `.backbone`.
        weights (str): path of the checkpoint.
        key (str): what names it, for the errors.

    Returns:
        list[str]: tensors outside the backbone that the checkpoint does not hold in their shape.

    Raises:
        ConfigError: it cannot be read, or a tensor of the backbone is missing, of another shape or
            not finite.
    """
    checkpointer = _WholeBackbone(model)
    try:
        checkpointer.load(weights)
    except ConfigError as error:
        raise ConfigError(f"{key}: {weights} {error}") from None
    except Exception as error:
        raise ConfigError(f"{key}: cannot read {weights}: {one_line(error)}") from error
    for name, tensor in model.backbone.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{key}: {weights} holds NaN or infinity in backbone.{name}")
    logger.info("Weights: %s", weights)
    return checkpointer.absent
