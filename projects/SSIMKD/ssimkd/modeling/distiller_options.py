"""What the options of a Distiller may be; an error names the key of `MODEL.DISTILL`."""

from typing import Any, Dict, Sequence

from ssimkd.errors import ConfigError, wrong_input
from ssimkd.losses import KDLoss
from ssimkd.utils.validate import check_coefficients, check_integers, check_switches

ADAPTERS = ("none", "conv1x1")


def check_values(mask_padding: bool, loss_weight: float, **integers: Any) -> None:
    """Raises ConfigError unless they are a truth value, a finite number and integers, >= 0."""
    with wrong_input():
        check_switches(**{"MODEL.DISTILL.MASK_PADDING": mask_padding})
        check_coefficients(**{"MODEL.DISTILL.TEACHER.LOSS_WEIGHT": loss_weight})
        check_integers(**{f"MODEL.DISTILL.{k.upper()}": value for k, value in integers.items()})


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
    with wrong_input():
        for weight in weights:
            check_coefficients(**{"MODEL.DISTILL.LEVEL_WEIGHTS": weight})
    return dict(zip(levels, map(float, weights)))
