"""Building a loss from its config node."""

from ssimkd.errors import ConfigError
from ssimkd.registry import KD_LOSS_REGISTRY

from .base import KDLoss


def build_loss(name: str, node) -> KDLoss:
    """The loss `name` with the settings of `MODEL.DISTILL.<NAME>`.

    Args:
        name (str): a name in KD_LOSS_REGISTRY.
        node (CfgNode): `cfg.MODEL.DISTILL`.

    Raises:
        ConfigError: the loss or its node does not exist, or a setting is wrong.
    """
    if name not in KD_LOSS_REGISTRY:
        known = ", ".join(sorted(key for key, _ in KD_LOSS_REGISTRY))
        raise ConfigError(
            f"MODEL.DISTILL.LOSSES: there is no loss {name!r}; there are {known}; "
            "--import names the module of a loss of your own"
        )
    key = name.upper()
    if key not in node:
        raise ConfigError(
            f"MODEL.DISTILL.{key} is missing: register the loss {name} before add_ssimkd_config"
        )
    return KD_LOSS_REGISTRY.get(name)(**{k.lower(): v for k, v in node[key].items()})
