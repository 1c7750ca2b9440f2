"""Random number generators: of Python, NumPy and torch (CPU, and every GPU that it sees)."""

import random
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Tuple, cast

import numpy as np
import torch


def get_random_state() -> Dict[str, Any]:
    """The state of every generator. torch can load it with weights_only."""
    kind, keys, *rest = cast(Tuple, np.random.get_state())
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        # the model's GPU need not be the current one
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Dict[str, Any]) -> None:
    """Restores what :func:`get_random_state` returned."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        for device, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(own, device)


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """After the block every generator has the state that it had before."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)
