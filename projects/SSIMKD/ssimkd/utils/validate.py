"""Checks of options. Each raises a ConfigError that names the option."""

import math
from numbers import Integral, Real
from typing import Any

from ssimkd.errors import ConfigError


def check_switches(**options: Any) -> None:
    """Raises ConfigError unless every option is True or False. Python takes "no" for true."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {value!r}")


def check_integers(least: int = 0, /, **options: Any) -> None:
    """Raises ConfigError unless every option is an integer >= `least`."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise ConfigError(f"{name} must be an integer >= {least}, got {value!r}")


def check_coefficients(sign: str = ">=", /, **options: Any) -> None:
    """Raises ConfigError unless every option is a finite number >= 0."""
    for name, value in options.items():
        if not is_finite(value) or value < 0 or (sign == ">" and value == 0):
            raise ConfigError(f"{name} must be a finite number {sign} 0, got {value!r}")


def check_factors(**factors: Any) -> None:
    """Raises ConfigError unless every factor is a finite number >= 0, and one is above 0."""
    check_coefficients(**factors)
    if not any(factors.values()):
        raise ConfigError(f"{', '.join(factors)} must not all be 0: nothing would be compared")


def check_positive(**options: Any) -> None:
    """Raises ConfigError unless every option is a finite number > 0."""
    check_coefficients(">", **options)


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and neither infinite nor NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
