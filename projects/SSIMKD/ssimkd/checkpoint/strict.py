"""Checkpoints of students and teachers, of every kind that Detectron2 reads, without a gap."""

import logging
from collections import OrderedDict
from typing import Any, Dict, List

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from ssimkd.errors import ConfigError, as_config_error

from .reader import CheckpointReader

logger = logging.getLogger(__name__)


class StrictCheckpointer(CheckpointReader):
    """The checkpoints of a run's model, which never keeps random values unnoticed.

    Args:
        model (nn.Module): as Detectron2's.
        save_dir (str): as Detectron2's.
        whole (bool): a file must hold every tensor. Otherwise it may leave some as they are, but
            not all, nor hold a backbone of other shapes.
        options: as Detectron2's.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, whole: bool = False, **options
    ) -> None:
        super().__init__(model, save_dir, **options)
        self.whole = whole

    def _log_incompatible_keys(self, incompatible) -> None:
        wrong = unloaded_tensors(incompatible)
        if wrong and self.whole:
            raise ConfigError(f"does not fit the model: {first_three(list(wrong.values()))}")
        none = all(name in wrong for name, _ in self.model.named_parameters())
        # heads may differ, in their number of classes; a backbone of other shapes is another one
        other = [wrong[x[0]] for x in incompatible.incorrect_shapes if x[0].startswith("backbone.")]
        if none or other:
            raise ConfigError(f"is another model's: {first_three(other or list(wrong.values()))}")
        super()._log_incompatible_keys(incompatible)


def unloaded_tensors(incompatible) -> Dict[str, str]:
    """Tensors that a file does not hold in the model's shape -> that in words."""
    wrong = {name: f"{name} is missing" for name in incompatible.missing_keys}
    wrong.update(
        (name, f"{name} is {tuple(found)} instead of {tuple(expected)}")
        for name, found, expected in incompatible.incorrect_shapes
    )
    # counters of training steps have no effect
    return {k: v for k, v in wrong.items() if not k.endswith("num_batches_tracked")}


def first_three(texts: List[str]) -> str:
    """The first three of several facts."""
    return "; ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


class _TeacherCheckpointer(CheckpointReader):
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
        wrong = unloaded_tensors(incompatible)
        backbone = [text for name, text in wrong.items() if name.startswith("backbone.")]
        if backbone:
            raise ConfigError(f"does not fit the backbone of its config: {first_three(backbone)}")
        # a teacher that was a student itself needs nothing of its own teacher's
        self.absent = [name for name in wrong if not name.startswith("distiller.")]


def load_teacher(model: Any, weights: str, key: str = "MODEL.DISTILL.TEACHER.WEIGHTS") -> List[str]:
    """Loads a checkpoint that must hold the whole backbone.

    Args:
        model (nn.Module): a detector; all of it must be finite where it has no `.backbone`.
        weights (str): path of the checkpoint.
        key (str): what names it, for the errors.

    Returns:
        list[str]: tensors outside the backbone that the checkpoint does not hold in their shape.

    Raises:
        ConfigError: it cannot be read, or a tensor of the backbone is missing, of another shape or
            not finite.
    """
    checkpointer = _TeacherCheckpointer(model)
    with as_config_error(key):
        checkpointer.load(weights)
    part = "backbone." if hasattr(model, "backbone") else ""
    for name, tensor in model.state_dict().items():
        if name.startswith(part) and not torch.isfinite(tensor).all():
            raise ConfigError(f"{key}: {weights} holds NaN or infinity in {name}")
    logger.info("Weights: %s", weights)
    return checkpointer.absent
