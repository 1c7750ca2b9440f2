"""A detector of the report, and what is measured of it here."""

import os
import statistics
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from ssimkd.checkpoint.export import PREFIX
from ssimkd.checkpoint.graph import OneImage
from ssimkd.checkpoint.reader import read_checkpoint
from ssimkd.errors import ConfigError
from ssimkd.modeling.meta_arch import image_format_of
from ssimkd.modeling.several_teachers import distillers_of
from ssimkd.teacher.frozen import convert_channel_order, training_image_format

from .run import Run

WARM, TIMED = 2, 10  # images that do not count, and that do, twice each


@dataclass
class Detector:
    """A student, its twin without teacher, or a teacher.

    Attributes:
        label (str): what tables and legends call it.
        run (Run or None): its folder; None of a teacher that was not evaluated here.
        model (nn.Module or None): it, with its weights; None where they are not there.
        weights (str): path of the file whose size counts.
        format (str): channel order of the images that it takes, "BGR" or "RGB".
        teaches (bool): whether it is a teacher of the run that is reported.
    """

    label: str
    run: Optional[Run]
    model: Optional[nn.Module]
    weights: str
    format: str = "BGR"
    teaches: bool = False

    def detect(self, x: Dict[str, Any], shown: str) -> Any:
        """Its Instances in one image, whose channel order is `shown`."""
        assert self.model is not None
        image = convert_channel_order([x["image"]], shown, self.format)[0]
        with torch.no_grad():
            return self.model([{**x, "image": image}])[0]["instances"].to("cpu")

    def measure(self, inputs: List[Dict[str, Any]]) -> Dict[str, Optional[float]]:
        """Parameters (millions), FLOPs (billions), size of the checkpoint (MB).

        None is what cannot be measured: without weights or images.

        Args:
            inputs (list[dict]): images; FLOPs are counted on the first one.
        """
        size = os.path.getsize(self.weights) / 1e6 if os.path.isfile(self.weights) else None
        parameters = flops = None
        if self.model is not None:
            named = self.model.named_parameters()
            parameters = sum(p.numel() for n, p in named if not n.startswith(PREFIX)) / 1e6
        if self.model is not None and inputs:
            # tracing is more particular than running
            with suppress(Exception), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                flops = flop_counter(self.model, inputs[0]["image"]).total() / 1e9
        return {"parameters": parameters, "flops": flops, "checkpoint": size}

    def file(self) -> str:
        """The checkpoint's name and the precision of its weights, in words."""
        if not os.path.isfile(self.weights):
            return ""
        try:
            content = read_checkpoint(self.weights)
        except ConfigError:
            return os.path.basename(self.weights)
        weights = content.get("model", content)
        kinds = {
            str(v.dtype).replace("torch.", "") for v in weights.values() if hasattr(v, "dtype")
        }
        floats = ", ".join(sorted(kind for kind in kinds if "float" in kind))
        also = " and the optimizer's state" if "optimizer" in content else ""
        return f"{os.path.basename(self.weights)}: {floats}{also}"


def speeds(
    detectors: List[Detector], inputs: List[Dict[str, Any]], shown: str
) -> Mapping[str, float]:
    """Images per second by label: one at a time, the detectors in turn, medians after a warm-up."""
    taken: Dict[str, List[float]] = {d.label: [] for d in detectors if d.model is not None}
    for number, x in enumerate([*inputs[:WARM], *inputs[:TIMED], *inputs[:TIMED]]):
        for d in detectors:
            if d.model is None:
                continue
            start = time.perf_counter()
            d.detect(x, shown)  # its result is on the CPU: the device has finished
            if number >= WARM:
                taken[d.label].append(time.perf_counter() - start)
    return {label: 1 / statistics.median(found) for label, found in taken.items() if found}


def flop_counter(model: nn.Module, image: Tensor) -> FlopCountAnalysis:
    """fvcore's for one image, a multiply and add as one; it runs the model when it is asked."""
    counter = FlopCountAnalysis(OneImage(model), image)
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return counter.tracer_warnings("none")


def teachers_of(model: nn.Module, notes: List[str]) -> List[Detector]:
    """The whole teachers of a student; those that cannot be loaded are noted and left out."""
    found = []
    for name, distiller in distillers_of(model):
        if not distiller.enabled:
            continue
        label = f"teacher {name}".rstrip()
        try:
            detector, cfg, absent = distiller.spec.load(next(model.parameters()).device)
            weights, order = distiller.spec.find_weights(), training_image_format(cfg, detector)
        except ConfigError as error:
            notes.append(f"The {label} could not be loaded: {error}")
            continue
        if absent:
            notes.append(f"The {label}'s detections are left out: its checkpoint lacks {absent[0]}")
        found.append(Detector(label, None, None if absent else detector, weights, order, True))
    return found


def detectors_of(run: Run, others: List[Run], notes: List[str]) -> List[Detector]:
    """The run's own detector first, then those of other runs, then teachers.

    Args:
        run (Run): the run that is reported.
        others (list[Run]): of them, an evaluation of a teacher's weights is that teacher's.
        notes (list[str]): takes what is left out and why.
    """
    model = build(run, notes)
    teachers = teachers_of(model, notes) if model is not None else []
    models = {id(other): build(other, notes) for other in others if not evaluates(other, teachers)}
    twins = any(distils(m) for m in [model, *models.values()])
    label = "student" if distils(model) else twin_label(run, model, twins)
    found = [of_run(label, run, model)]
    for other in others:
        taught = evaluates(other, teachers)
        if taught:
            taught[0].run = other
            continue
        model = models[id(other)]
        label = other.name if distils(model) else twin_label(other, model, twins)
        taken = {d.label for d in found}
        found.append(of_run(other.folder if label in taken else label, other, model))
    return [*found, *teachers]


def evaluates(run: Run, teachers: List[Detector]) -> List[Detector]:
    """Those of the teachers whose weights the run is of."""
    weights = os.path.realpath(run.weights)
    return [t for t in teachers if os.path.realpath(t.weights) == weights]


def twin_label(run: Run, model: Optional[nn.Module], twins: bool) -> str:
    """The label of a run without teacher: "vanilla" if it trained beside one that has one."""
    return "vanilla" if twins and model is not None and not run.only_evaluated else run.name


def of_run(label: str, run: Run, model: Optional[nn.Module]) -> Detector:
    """The detector that a run trained."""
    weights = run.student if os.path.isfile(run.student) else run.weights
    return Detector(label, run, model, weights, image_format_of(model))


def distils(model: Optional[nn.Module]) -> bool:
    """Whether a model learns from a teacher."""
    return any(distiller.enabled for _, distiller in distillers_of(model))


def build(run: Run, notes: List[str]) -> Optional[nn.Module]:
    """The run's model, or None and a note."""
    try:
        return run.build()
    except ConfigError as error:
        notes.append(f"Pictures and measurements of {run.name} are left out: {error}")
        return None
