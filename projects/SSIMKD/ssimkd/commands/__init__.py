"""The commands of `ssimkd`. Each is a file with a function `main`; `ssimkd_cli.py` calls it."""

import argparse
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ssimkd_cli import parse

from ssimkd.checkpoint.reader import read_categories
from ssimkd.data.datasets import categories_of
from ssimkd.engine.arguments import load_config, read_config
from ssimkd.engine.run_record import import_of_file
from ssimkd.errors import ConfigError, as_config_error
from ssimkd.utils.config_keys import setting
from ssimkd.utils.user_code import import_user_code


class Trained(NamedTuple):
    """What a command line says of a trained detector.

    Attributes:
        cfg (CfgNode or DictConfig): of --config-file.
        weights (str): path or URL of the checkpoint.
        categories (list[dict]): "id" and "name" of each class, as the checkpoint tells them, or
            the data of the config.
    """

    cfg: Any
    weights: str
    categories: List[Dict[str, Any]]


def begin(name: str, words: Optional[Sequence[str]]) -> argparse.Namespace:
    """The arguments of a command, once the modules of --import are imported."""
    args = parse(name, words)
    import_user_code(args.imports)
    return args


def load_trained(args: argparse.Namespace, *splits: str) -> Trained:
    """The config, checkpoint and classes of a trained detector.

    Args:
        args (Namespace): --config-file, --weights and overrides.
        splits (str): "TEST" registers its data, which may be missing if the checkpoint tells the
            classes.

    Raises:
        ConfigError: no checkpoint is named, or a file cannot be read.
    """
    weights = args.weights
    if not weights:
        weights = setting(read_config(args.config_file, args.opts), "weights")
    if not weights:
        raise ConfigError("--weights: name the detector's checkpoint; its config has none")
    import_of_file(weights)
    with as_config_error(f"--weights: {weights}", sep=" "):
        categories = read_categories(weights)
    cfg = load_config(args.config_file, args.opts, splits, len(categories))
    return Trained(cfg, weights, categories or categories_of(cfg))
