"""Which tensors of a model a checkpoint covers, and loading one that must cover a backbone."""

import logging
from collections import OrderedDict
from typing import Any, Dict, List

import torch
from detectron2.layers import FrozenBatchNorm2d

from ssimkd.errors import ConfigError, as_config_error

from .reader import CheckpointReader

logger = logging.getLogger(__name__)


def unloaded_tensors(incompatible) -> Dict[str, str]:
    """Names of tensors that a checkpoint lacks or holds in another shape -> what is wrong."""
    wrong = {name: f"{name} is missing" for name in incompatible.missing_keys}
    wrong.update(
        (name, f"{name} is {tuple(found)} instead of {tuple(expected)}")
        for name, found, expected in incompatible.incorrect_shapes
    )
    # Counters of training steps have no effect.
    return {k: v for k, v in wrong.items() if not k.endswith("num_batches_tracked")}


def first_three(texts: List[str]) -> str:
    """The first three of several texts, and how many more there are."""
    return "; ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


class _CoveringCheckpointer(CheckpointReader):
    """Raises unless a checkpoint covers the backbone.

    Attributes:
        absent (list[str]): tensors outside the backbone that keep their random values.
    """

    absent: List[str]

    def _load_model(self, checkpoint):
        weights = checkpoint["model"]
        if not hasattr(weights, "_metadata") and any(k.endswith("running_var") for k in weights):
            # Without a version FrozenBatchNorm2d takes 0 and 1 for statistics that a file lacks.
            # That is right only for files such as Caffe2's, whose scale and bias contain them all.
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
        # A student's checkpoint may hold a distiller, which a detector does not need.
        self.absent = [name for name in wrong if not name.startswith("distiller.")]


def load_detector_weights(
    model: Any, weights: str, key: str = "MODEL.DISTILL.TEACHER.WEIGHTS"
) -> List[str]:
    """Loads a checkpoint that must hold the whole backbone into a detector.

    Args:
        model (nn.Module): a detector. If it has no `.backbone`, all its tensors must be finite.
        weights (str): path of the checkpoint.
        key (str): the setting that errors name.

    Returns:
        list[str]: tensors outside the backbone that the checkpoint does not hold in their shape.

    Raises:
        ConfigError: it cannot be read, or a tensor of the backbone is missing, of another shape or
            not finite.
    """
    checkpointer = _CoveringCheckpointer(model)
    with as_config_error(key):
        checkpointer.load(weights)
    part = "backbone." if hasattr(model, "backbone") else ""
    for name, tensor in model.state_dict().items():
        if name.startswith(part) and not torch.isfinite(tensor).all():
            raise ConfigError(f"{key}: {weights} holds NaN or infinity in {name}")
    logger.info("Weights: %s", weights)
    return checkpointer.absent
