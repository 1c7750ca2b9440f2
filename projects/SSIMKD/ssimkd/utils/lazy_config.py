"""Reading LazyConfigs."""

from typing import Any

from detectron2.utils.registry import locate


def target_of(node) -> Any:
    """What a lazy node calls; a config that was saved names it by a string."""
    return locate(node._target_) if isinstance(node._target_, str) else node._target_
