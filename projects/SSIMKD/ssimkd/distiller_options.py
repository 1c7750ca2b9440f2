"""What the options of a Distiller may be; an error names the key of `MODEL.DISTILL`."""

import math
from numbers import Integral, Real
from typing import Dict, Sequence

from .errors import ConfigError
from .losses import KDLoss

ADAPTERS = ("none", "conv1x1")


def check_numbers(**options: float) -> None:
    """Raises ConfigError unless every option is a finite number >= 0, whole unless a weight."""
    for name, value in options.items():
        weight = name.endswith(("weight", "weights"))
        kind, number = (Real, "a finite number") if weight else (Integral, "an integer")
        if not (isinstance(value, kind) and 0 <= value < math.inf):
            key = "TEACHER.LOSS_WEIGHT" if name == "loss_weight" else name.upper()
            raise ConfigError(f"MODEL.DISTILL.{key} must be {number} >= 0, got {value!r}")


def check_names(
    adapter: str, losses: Sequence[KDLoss], in_features: Sequence[str], inherit: Sequence[str]
) -> None:
    """Raises ConfigError where an option of these is unknown, empty, doubled or no list."""
    if adapter not in ADAPTERS:
        raise ConfigError(f"MODEL.DISTILL.ADAPTER: {adapter!r} is none of {', '.join(ADAPTERS)}")
    names = [loss.name for loss in losses]
    if len(set(names)) < len(names):
        raise ConfigError(f"MODEL.DISTILL.LOSSES names a loss twice: {', '.join(names)}")
    for key, value in (("IN_FEATURES", in_features), ("INHERIT", inherit)):
        if isinstance(value, str):
            raise ConfigError(f"MODEL.DISTILL.{key} must be a list, got {value!r}")
        if not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
            raise ConfigError(f"MODEL.DISTILL.{key} must hold different names, got {list(value)}")
    if not in_features:
        raise ConfigError("MODEL.DISTILL.IN_FEATURES is empty: name levels, or set LOSSES to ()")


def check_level_weights(weights: Sequence[float], levels: Sequence[str]) -> Dict[str, float]:
    """Level -> its factor; raises ConfigError where there is not one, finite and >= 0, for each."""
    if weights and len(weights) != len(levels):
        raise ConfigError(
            f"MODEL.DISTILL.LEVEL_WEIGHTS has {len(weights)} numbers for the {len(levels)} levels "
            f"of IN_FEATURES, {', '.join(levels)}"
        )
    for weight in weights:
        check_numbers(level_weights=weight)
    return dict(zip(levels, map(float, weights)))
