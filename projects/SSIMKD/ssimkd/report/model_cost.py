"""The cost of a detector: parameters, FLOPs, size of its file, images per second."""

import time
import warnings
from contextlib import suppress
from typing import Any, Dict, List, Optional, Tuple

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from ssimkd.checkpoint.export import PREFIX
from ssimkd.checkpoint.graph import detect
from ssimkd.utils.measure import interleave

from .detectors import Detector

REPEATS = 5  # how often each detector is timed


class OneImage(nn.Module):
    """A detector whose input and outputs are tensors, so that fvcore can trace it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        """(3, H, W) -> a tensor of n rows for each field of the detections."""
        return tuple(detect(self.model, [{"image": image}]).values())


def flop_counter(model: nn.Module, image: Tensor) -> FlopCountAnalysis:
    """fvcore's counter for one image. A multiplication and its addition count as one.

    Args:
        model (nn.Module): in evaluation mode. It runs when the counter is asked for a number.
        image (Tensor): (3, H, W), as the model takes it.
    """
    counter = FlopCountAnalysis(OneImage(model), image)
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return counter.tracer_warnings("none")


def costs(detector: Detector, file_name: str) -> Dict[str, Optional[float]]:
    """Parameters in millions, FLOPs in billions and the weights' size in MB; None if not known.

    What only the distillation or the training needs is not counted.

    Args:
        detector (Detector): may lack its model.
        file_name (str): the image on which FLOPs are counted, or "" if there is none.
    """
    found: Dict[str, Optional[float]] = dict.fromkeys(("parameters", "flops", "size"))
    if detector.model is not None:
        own = (p for n, p in detector.model.named_parameters() if not n.startswith(PREFIX))
        found["parameters"] = sum(p.numel() for p in own) / 1e6
        weights = detector.model.state_dict().items()
        kept = (x for name, x in weights if not name.startswith(PREFIX))
        found["size"] = sum(x.numel() * x.element_size() for x in kept) / 1e6
        # Some operators run but cannot be traced.
        with suppress(Exception), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = detector.read(file_name)["image"]
            found["flops"] = flop_counter(detector.model, image).total() / 1e9
    return found


def speeds(detectors: List[Detector], file_names: List[str]) -> Dict[str, float]:
    """Label -> images per second, one image at a time. Reading and resizing it is included.

    Detectors that do the same in an evaluation are measured once.
    """
    first: Dict[Any, Detector] = {}
    detectors = [d for d in detectors if d.model is not None and d.runs_here]
    keys = {d.label: d.in_evaluation for d in detectors}
    for detector in detectors:
        first.setdefault(keys[detector.label], detector)

    def run(detector: Detector) -> None:
        for name in file_names:
            detector.detect(name)  # the result is on the CPU, so the GPU has finished

    calls = {key: lambda d=d: run(d) for key, d in first.items()}
    seconds = interleave(calls, REPEATS, time.perf_counter) if file_names else {}
    return {label: len(file_names) / seconds[key] for label, key in keys.items() if key in seconds}
