"""The gradient of the distillation losses compared with that of the detector's own losses.

The values of losses do not show how strongly each acts on the student: of two losses of equal
value, one can have a gradient that is 1000 times as long. Weights are chosen by this ratio.
"""

from collections import defaultdict
from functools import partial
from typing import Any, Callable, Dict, Optional, Set, Tuple

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor


class GradientRatio:
    """Measures two gradients at the same tensors in the one backward pass of a training step.

    Detector and distiller get views of what a backbone returns, and of what a head predicts if a
    loss compares its predictions. After the backward pass the event storage gets "gradient_ratio",
    the Euclidean norm of the distillation's gradient, with its weights, divided by the norm of the
    detector's. Both norms are taken over the maps that the distillation reaches, or over the
    predictions if no loss compares maps. The storage also gets "gradient_ratio/<level>" and
    "gradient_ratio/<kind of head>" for each that both reach. A ratio to a gradient of 0 is left
    out. At the maps, the gradient of a loss that compares predictions counts as the detector's.

    Args:
        log (bool): put the values into the event storage.
        report (callable or None): also called with these values.
    """

    def __init__(self, log: bool, report: Optional[Callable[[Dict[str, float]], None]]) -> None:
        self.storage = get_event_storage() if log else None
        self.report = report
        self.maps: Set[str] = set()  # names
        self.squares: Dict[str, Dict[str, Any]] = {}  # side -> name -> squared norm

    def split_maps(self, maps: Dict[str, Tensor]) -> Tuple[Any, Any]:
        """Views of the maps (N, C, H, W) by level, for the detector and for the distiller."""
        self.maps |= set(maps)
        pairs = {level: self.split(level, x) for level, x in maps.items()}
        return {k: own for k, (own, _) in pairs.items()}, {k: kd for k, (_, kd) in pairs.items()}

    def split(self, name: str, output: Any) -> Tuple[Any, Any]:
        """Views of a tensor, or of those in nested lists, for the detector and the distiller."""
        if not isinstance(output, Tensor):
            pairs = [self.split(name, x) for x in output]
            return tuple(type(output)(side) for side in zip(*pairs))
        views = output.view_as(output), output.view_as(output)
        for side, view in zip(("detector", "distiller"), views):
            if view.requires_grad:
                view.register_hook(partial(self._measure, side, name))
        return views

    def _measure(self, side: str, name: str, gradient: Tensor) -> None:
        if not self.squares:
            torch.autograd.Variable._execution_engine.queue_callback(self._log)
        squares = self.squares.setdefault(side, defaultdict(float))
        squares[name] = squares[name] + gradient.float().square().sum()

    def _log(self) -> None:
        detector, distiller = (self.squares.get(side, {}) for side in ("detector", "distiller"))
        if not (detector and distiller):  # the backward pass of one side alone
            return
        # a loss of weight 0 sends a gradient of 0
        reached = {name for name, square in distiller.items() if square > 0}
        names = self.maps & reached or reached or set(distiller)
        sums = (sum(side.get(name, 0.0) for name in names) for side in (distiller, detector))
        squares = {"gradient_ratio": [float(x) for x in sums]}
        for name in detector.keys() & distiller.keys():
            squares[f"gradient_ratio/{name}"] = [float(distiller[name]), float(detector[name])]
        values = {key: (kd / own) ** 0.5 for key, (kd, own) in squares.items() if own > 0}
        if self.storage is not None:
            self.storage.put_scalars(smoothing_hint=True, **values)
        if self.report is not None:
            self.report(values)
