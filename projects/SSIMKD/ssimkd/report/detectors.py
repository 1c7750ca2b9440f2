"""The detectors of a report: those of the runs, and the teachers of the reported one."""

import os
from dataclasses import dataclass
from typing import Any, List, Optional

import torch
from detectron2.structures import Instances
from torch import nn

from ssimkd.errors import ConfigError, as_config_error
from ssimkd.evaluation.predictor import image_reader
from ssimkd.modeling.several_teachers import distillers_of

from .run import Run


@dataclass
class Detector:
    """One detector of the report.

    Attributes:
        label (str): its name in tables and legends.
        run (Run or None): None for a teacher that was not evaluated.
        model (nn.Module or None): in evaluation mode; None if it cannot be loaded.
        read (callable): an image file -> the input of the model.
        file (str): the file of its weights.
        teaches (bool): whether it is a teacher of the run that is reported.
    """

    label: str
    run: Optional[Run]
    model: Optional[nn.Module] = None
    read: Any = None
    file: str = ""
    teaches: bool = False

    @property
    def distils(self) -> bool:
        """Whether it learned from a teacher."""
        return any(distiller.enabled for _, distiller in distillers_of(self.model))

    @torch.no_grad()
    def detect(self, file_name: str) -> Optional[Instances]:
        """Its detections in an image, on the CPU; None if it outputs no instances."""
        assert self.model is not None
        found = self.model([self.read(file_name)])[0].get("instances")
        return None if found is None else found.to("cpu")


def load_detectors(run: Run, others: List[Run], notes: List[str]) -> List[Detector]:
    """Loads the run's detector, those of the other runs, and the teachers, in this order.

    Another run that evaluated the weights of a teacher is taken as the results of that teacher.

    Args:
        run (Run): the run that is reported.
        others (list[Run]): the runs it is compared with.
        notes (list[str]): gets a sentence for each detector that cannot be loaded.
    """
    own = load_run(run, run.name, notes)
    teachers = load_teachers(own.model, notes) if own.model is not None else []
    found = [own]
    for other in others:
        same = [t for t in teachers if os.path.realpath(t.file) == os.path.realpath(other.weights)]
        if same:
            same[0].run = other
            continue
        taken = {d.label for d in (*found, *teachers)}
        label = other.folder if other.name in taken else other.name
        found.append(load_run(other, label, notes))
    return [*found, *teachers]


def load_run(run: Run, label: str, notes: List[str]) -> Detector:
    """The detector that a run trained or evaluated."""
    exported = run.path("student.pth")
    found = Detector(label, run, file=exported if os.path.isfile(exported) else run.weights)
    try:
        with as_config_error("its images cannot be prepared", Exception):
            found.read = image_reader(run.cfg)
        found.model = run.build()
    except ConfigError as error:
        notes.append(f"Pictures and measurements of {label} are left out: {error}")
    return found


def load_teachers(model: nn.Module, notes: List[str]) -> List[Detector]:
    """The teachers of a student as whole detectors."""
    found = []
    for name, distiller in distillers_of(model):
        if not distiller.enabled:
            continue
        label = f"teacher {name}".rstrip()
        try:
            detector, cfg, absent = distiller.spec.load(next(model.parameters()).device)
            read, path = image_reader(cfg), distiller.spec.find_weights()
        except ConfigError as error:
            notes.append(f"The {label} could not be loaded: {error}")
            continue
        if absent:
            notes.append(f"The {label} detects nothing here: its checkpoint lacks {absent[0]}.")
        found.append(Detector(label, None, None if absent else detector, read, path, True))
    return found
