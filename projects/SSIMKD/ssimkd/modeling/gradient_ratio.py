"""How hard the distillation pulls at the student's maps, against the detector's own losses.

A weight is a choice of this ratio, which the values of the losses do not show: of two losses of
equal value one can have a gradient that is orders of magnitude smaller.
"""

from functools import partial
from typing import Dict

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor

Maps = Dict[str, Tensor]


class GradientRatio:
    """Compares two gradients at the same maps in the one backward of a training step.

    Both sides get views of the maps. When the backward is done, the event storage gets
    "gradient_ratio", the Euclidean norm of the distillation's gradient, weights included, over the
    detector's, at all maps together, and "gradient_ratio/<level>" where both reach a level.

    Args:
        maps (dict[str, Tensor]): level -> (N, C, H, W), what a backbone returns.
    """

    def __init__(self, maps: Maps) -> None:
        self.maps, self.storage = maps, get_event_storage()
        self.squares: Dict[str, Maps] = {}  # side -> level -> squared norm

    def view(self, side: str) -> Maps:
        """The maps for "detector" or "distiller"."""
        views = {level: maps.view_as(maps) for level, maps in self.maps.items()}
        for level, maps in views.items():
            if maps.requires_grad:
                maps.register_hook(partial(self._take, side, level))
        return views

    def _take(self, side: str, level: str, gradient: Tensor) -> None:
        if not self.squares:
            torch.autograd.Variable._execution_engine.queue_callback(self._write)
        self.squares.setdefault(side, {})[level] = gradient.float().square().sum()

    def _write(self) -> None:
        detector, distiller = (self.squares.get(side, {}) for side in ("detector", "distiller"))
        if not (detector and distiller):  # a backward of one side alone
            return
        total = sum(distiller.values()) / sum(detector.values())
        self.storage.put_scalar("gradient_ratio", float(total**0.5))
        for level in detector.keys() & distiller.keys():
            ratio = float((distiller[level] / detector[level]) ** 0.5)
            self.storage.put_scalar(f"gradient_ratio/{level}", ratio)
