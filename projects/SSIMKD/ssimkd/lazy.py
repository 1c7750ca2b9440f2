"""Reading LazyConfigs."""

from typing import Any, Iterator, List, Mapping, Tuple

from detectron2.utils.registry import locate
from omegaconf import ListConfig, OmegaConf


def target_of(node) -> Any:
    """What a lazy node calls; a config that was saved names it by a string."""
    return locate(node._target_) if isinstance(node._target_, str) else node._target_


def lazy_names(cfg, split: str) -> Tuple[List[str], str]:
    """Names of the data sets of a LazyConfig's split ("TRAIN" or "TEST"), and their key."""
    key = f"dataloader.{split.lower()}.dataset.names"
    names = OmegaConf.select(cfg, key) or []
    return list(names) if isinstance(names, (ListConfig, list, tuple)) else [names], key


def lazy_losses(distiller) -> Iterator[Any]:
    """The nodes of the losses of a Distiller's node, or of all in a Distillers' node."""
    if distiller is not None:
        for node in [distiller] if "losses" in distiller else distiller.values():
            yield from node.get("losses", ()) if isinstance(node, Mapping) else ()
