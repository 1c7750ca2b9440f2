"""A run's model, seen as a student that may have teachers."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssimkd.errors import ConfigError

from .meta_arch import DistillMixin


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, if it is in one."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def build_teacher(model: nn.Module) -> None:
    """Builds a student's teacher now, so that its failures come before the data is read."""
    if isinstance(model, DistillMixin) and model.distiller is not None:
        model.distiller.build_teacher(model.device)


def check_distils(model: nn.Module) -> None:
    """Raises ConfigError for a plain detector, which would ignore its teacher."""
    if not isinstance(model, DistillMixin):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE: {type(model).__name__} does not distil; set DistillRCNN, "
            "DistillRetinaNet or DistillPanopticFPN, or MODEL.DISTILL.LOSSES to ()"
        )
