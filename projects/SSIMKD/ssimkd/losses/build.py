"""A loss from its node in a config."""

from ssimkd.errors import ConfigError
from ssimkd.registry import KD_LOSS_REGISTRY

from .base import KDLoss


def build_loss(name: str, node) -> KDLoss:
    """The loss `name` with the settings of its node in `cfg.MODEL.DISTILL`.

    Raises:
        ConfigError: no such loss or node, or a setting that it refuses.
    """
    if name not in KD_LOSS_REGISTRY:
        known = ", ".join(sorted(key for key, _ in KD_LOSS_REGISTRY))
        raise ConfigError(f"MODEL.DISTILL.LOSSES: there is no loss {name!r}; there are {known}")
    key = name.upper()
    if key not in node:
        raise ConfigError(
            f"MODEL.DISTILL.{key} is missing: the loss {name!r} needs its settings there"
        )
    try:
        return KD_LOSS_REGISTRY.get(name)(**{k.lower(): v for k, v in node[key].items()})
    except (OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"MODEL.DISTILL.{key}: {error}") from error
