"""Puts numbers into the event storage that a GPU computes, without waiting for the GPU."""

import math
from typing import Any, List, Mapping, NamedTuple, Tuple

import torch
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor


class Kept(NamedTuple):
    """Scalars of one iteration on their way to the host.

    Attributes:
        storage (EventStorage): where they belong.
        iteration (int): the storage's, when they were computed.
        names (tuple[str]): one for each number.
        numbers (Tensor): (len(names),), in the host's memory.
        copied (torch.cuda.Event or None): after it `numbers` hold the values; None: they do now.
    """

    storage: EventStorage
    iteration: int
    names: Tuple[str, ...]
    numbers: Tensor
    copied: Any


class LateLog:
    """Keeps scalars until the host can read them without waiting.

    On a CPU that is at once. A GPU copies them while the host goes on, and a later :meth:`put` or
    :meth:`write` puts them into the event storage, with the iteration that they belong to.
    """

    def __init__(self) -> None:
        self.kept: List[Kept] = []

    def __reduce__(self) -> Tuple[type, Tuple]:
        return LateLog, ()  # a copy of a student has not computed these

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Keeps scalars of the current iteration, and puts those that have arrived by now."""
        numbers, copied = torch.stack([value.detach() for value in values.values()]), None
        if numbers.is_cuda:
            stream = torch.cuda.current_stream(numbers.device)
            numbers = numbers.to("cpu", non_blocking=True)  # which is pinned memory
            copied = stream.record_event()
        storage = get_event_storage()
        self.kept.append(Kept(storage, storage.iter, tuple(values), numbers, copied))
        self.write(wait=False)

    def write(self, wait: bool = True) -> None:
        """Writes the kept values to their event storage. NaN and infinity are left out.

        Args:
            wait (bool): wait for values that a GPU has not copied yet; otherwise they stay kept.
        """
        while self.kept and (wait or self.kept[0].copied is None or self.kept[0].copied.query()):
            storage, iteration, names, numbers, copied = self.kept.pop(0)
            if copied is not None:
                copied.synchronize()
            now, storage.iter = storage.iter, iteration
            for name, number in zip(names, numbers.tolist()):
                if math.isfinite(number):
                    storage.put_scalar(name, number)
            storage.iter = now
