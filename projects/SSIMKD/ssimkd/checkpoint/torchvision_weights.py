"""Loads the published weights of a network of torchvision."""

import os
import re

import torch
import torchvision
from torch import nn

from ssimkd.errors import ConfigError, as_config_error, one_line, shortened

from .reader import check_hash, read_weights

OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")  # in published files


def load_torchvision_weights(network: nn.Module, name: str, weights: str) -> None:
    """Loads weights of torchvision, all of them, into a network.

    Args:
        network (nn.Module): of torchvision.
        name (str): of the network in torchvision.
        weights (str): "DEFAULT", or a file or URL.

    Raises:
        ConfigError: they cannot be downloaded or read, or are those of another network.
    """
    key = "MODEL.TORCHVISION.WEIGHTS"
    if weights == "DEFAULT":
        entry = torchvision.models.get_model_weights(name).DEFAULT
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        file = os.path.join(folder, os.path.basename(entry.url))
        if os.path.isfile(file):
            with as_config_error(key):
                check_hash(entry.url, file)
        try:
            state = entry.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"{key}: cannot fetch {entry.url} ({one_line(error)}); put the file at {file}, or "
                "name it here"
            ) from error
    else:
        with as_config_error(key):
            state = read_weights(weights)
    for old in [name for name in state if OLD_DENSENET.search(name)]:
        state[OLD_DENSENET.sub(r"\1", old)] = state.pop(old)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{key}: {weights} does not fit {name}: {shortened(error)}") from error
