"""The gradient of the distillation losses compared with that of the detector's own losses.

The values of losses do not show how strongly each acts on the student: of two losses of equal
value, one can have a gradient that is 1000 times as long. Weights are chosen by this ratio.
"""

from functools import partial
from typing import Dict

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor

Maps = Dict[str, Tensor]


class GradientRatio:
    """Measures two gradients at the same maps in the one backward pass of a training step.

    Detector and distiller get views of the maps. After the backward pass the event storage gets
    "gradient_ratio", the Euclidean norm of the distillation's gradient, with its weights, divided
    by the norm of the detector's, over all maps together. It also gets "gradient_ratio/<level>" for
    each level that both reach.

    Args:
        maps (dict[str, Tensor]): level -> (N, C, H, W), what a backbone returns.
    """

    def __init__(self, maps: Maps) -> None:
        self.maps, self.storage = maps, get_event_storage()
        self.squares: Dict[str, Maps] = {}  # side -> level -> squared norm

    def view(self, side: str) -> Maps:
        """The maps for one side, "detector" or "distiller"."""
        views = {level: maps.view_as(maps) for level, maps in self.maps.items()}
        for level, maps in views.items():
            if maps.requires_grad:
                maps.register_hook(partial(self._measure, side, level))
        return views

    def _measure(self, side: str, level: str, gradient: Tensor) -> None:
        if not self.squares:
            torch.autograd.Variable._execution_engine.queue_callback(self._log)
        self.squares.setdefault(side, {})[level] = gradient.float().square().sum()

    def _log(self) -> None:
        detector, distiller = (self.squares.get(side, {}) for side in ("detector", "distiller"))
        if not (detector and distiller):  # the backward pass of one side alone
            return
        total = sum(distiller.values()) / sum(detector.values())
        self.storage.put_scalar("gradient_ratio", float(total**0.5))
        for level in detector.keys() & distiller.keys():
            ratio = float((distiller[level] / detector[level]) ** 0.5)
            self.storage.put_scalar(f"gradient_ratio/{level}", ratio)
