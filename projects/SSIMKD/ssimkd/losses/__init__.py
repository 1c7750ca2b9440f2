"""The losses, one file each; `MODEL.DISTILL.LOSSES` selects them by name.

Every module of this folder is imported here, and each loss class registers itself. A new loss is
therefore one new file. `from ssimkd.losses import SSIMLoss` works for every registered class.
A constructor raises ValueError with the name of an option whose value is out of its range.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ssimkd.registry import KD_LOSS_REGISTRY, register_loss

from .base import KDLoss, MapLoss
from .build import build_loss
from .context import Context

__all__ = ["KD_LOSS_REGISTRY", "Context", "KDLoss", "MapLoss", "build_loss", "register_loss"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> Any:
    """A registered loss class by its own name, such as `SSIMLoss`."""
    for _, cls in KD_LOSS_REGISTRY:
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
