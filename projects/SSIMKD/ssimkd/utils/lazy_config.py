"""Reading LazyConfigs."""

from typing import Any, Iterator, Mapping

from detectron2.utils.registry import locate


def target_of(node) -> Any:
    """What a lazy node calls; a config that was saved names it by a string."""
    return locate(node._target_) if isinstance(node._target_, str) else node._target_


def lazy_losses(distiller) -> Iterator[Any]:
    """The nodes of the losses of a Distiller's node, or of all in a Distillers' node."""
    if distiller is not None:
        for node in [distiller] if "losses" in distiller else distiller.values():
            yield from node.get("losses", ()) if isinstance(node, Mapping) else ()
