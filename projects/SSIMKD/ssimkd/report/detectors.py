"""The detectors of a report: those of the runs, and the teachers of the first one."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from detectron2.structures import Instances
from torch import nn

from ssimkd.checkpoint.export import PREFIX
from ssimkd.checkpoint.reader import sha256
from ssimkd.data.datasets import classes_in, classes_of, training_classes
from ssimkd.errors import ConfigError, as_config_error
from ssimkd.evaluation.predictor import image_reader
from ssimkd.modeling.several_teachers import distillers_of

from .config_diff import evaluation_settings, settings_of
from .run import Run

HEAD = ("AP", "AP50", "AP75")  # the metrics in the first table of the page


@dataclass
class Detector:
    """One detector of the report. It stands for several runs if they differ only in their seed.

    Attributes:
        label (str): its name in tables and legends.
        runs (list[Run]): the first one is shown in pictures; empty for a teacher that was not
            evaluated.
        model (nn.Module or None): in evaluation mode; None if it cannot be loaded.
        runs_here (bool): whether the model's operators are there.
        read (callable): an image file -> the input of the model.
        file (str): the file of a teacher's weights.
        classes (list[str]): the names of its classes, as far as they are known.
        teaches (bool): whether it is a teacher of the run that is reported.
    """

    label: str
    runs: List[Run] = field(default_factory=list)
    model: Optional[nn.Module] = None
    runs_here: bool = True
    read: Any = None
    file: str = ""
    classes: List[str] = field(default_factory=list)
    teaches: bool = False

    @property
    def dataset(self) -> str:
        """The data that it was evaluated on, or ""."""
        return self.runs[0].dataset if self.runs else ""

    @property
    def distils(self) -> bool:
        """Whether it learned from a teacher."""
        return any(distiller.enabled for _, distiller in distillers_of(self.model))

    @property
    def architecture(self) -> Tuple[Any, ...]:
        """Its parameters by name and shape, without those that only a distillation needs."""
        model = self.model or nn.Module()
        named = ((n, p.shape) for n, p in model.named_parameters() if not n.startswith(PREFIX))
        return tuple(sorted(named))

    @property
    def in_evaluation(self) -> Tuple[Any, ...]:
        """What its speed depends on: equal for detectors that do the same in an evaluation."""
        settings = evaluation_settings(self.runs[0]) if self.runs else (self.label,)
        return (*self.architecture, *settings)

    def has_classes(self, names: List[str]) -> bool:
        """Whether its classes are these, as far as both are known: by name, or else by number."""
        count = classes_in(getattr(self.model, "roi_heads", self.model))
        if names and len(self.classes) == count:
            return self.classes == names
        return not names or count in (0, len(names))

    def values(self, task: str, metric: str) -> List[float]:
        """A metric of all runs that have it, in percent.

        Detectron2 has no number for a run that detected nothing; its AP is 0.
        """
        tasks = (run.results.get(task, {}) for run in self.runs)
        found = [metrics[metric] for metrics in tasks if metric in metrics]
        if metric in HEAD:
            found = [value or 0.0 for value in found]
        return [value for value in found if value is not None]

    @torch.no_grad()
    def detect(self, file_name: str) -> Optional[Instances]:
        """Its detections in an image, on the CPU; None if it outputs no instances."""
        assert self.model is not None
        found = self.model([self.read(file_name)])[0].get("instances")
        return None if found is None else found.to("cpu")


def load_detectors(runs: List[Run], notes: List[str]) -> List[Detector]:
    """Loads the detector of the first run, those of the other runs, and the teachers.

    Another run that evaluated the weights of a teacher is taken as the results of that teacher.

    Args:
        runs (list[Run]): those that are reported.
        notes (list[str]): gets a sentence for each detector that cannot be loaded.
    """
    groups: Dict[Tuple, List[Run]] = {}
    for run in runs:
        key = (bool(run.training), *sorted(settings_of(run).items()))
        groups.setdefault(key, []).append(run)
    first, *others = groups.values()
    label, *labels = labels_of([[run.folder for run in group] for group in groups.values()])
    own = load_run(first, label, notes)
    teachers = load_teachers(own.model, notes) if own.model is not None else []
    found = [own]
    for group, label in zip(others, labels):
        path = group[0].weights
        digest = sha256(path) if os.path.isfile(path) else ""
        same = [t for t in teachers if sha256(t.file) == digest]
        if same:
            same[0].runs = group
            continue
        taken = label in {teacher.label for teacher in teachers}
        found.append(load_run(group, group[0].folder if taken else label, notes))
    return [*found, *teachers]


def labels_of(groups: List[List[str]]) -> List[str]:
    """The names of groups of runs: as few of their last folders as tell the groups apart.

    The name of several runs has no number: that of "ssim_seed1" and "ssim_seed2" is "ssim".

    Args:
        groups (list[list[str]]): the folders of the runs of each group.
    """
    paths = []
    for folders in groups:
        *above, name = Path(folders[0]).absolute().parts
        short = name if len(folders) == 1 else re.sub(r"[-_ ]*(seed)?[-_ ]*\d+$", "", name)
        paths.append([*above, short] if short else above)
    for depth in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-depth:]) for parts in paths]
        if len({*labels}) == len(labels):
            return labels
    return [folders[0] for folders in groups]


def load_run(runs: List[Run], label: str, notes: List[str]) -> Detector:
    """The detector that runs trained or evaluated; the model is that of the first one."""
    run = runs[0]
    found = Detector(label, runs, classes=classes_of(run.dataset) if run.dataset else [])
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
            notes.append(
                f"Pictures and measurements of the {label} are left out: its checkpoint lacks "
                f"{absent[0]}."
            )
        whole = None if absent else detector
        names = training_classes(cfg)
        found.append(Detector(label, [], whole, read=read, file=path, classes=names, teaches=True))
    return found
