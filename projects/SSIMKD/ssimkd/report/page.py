"""The report of a run: one HTML file that needs nothing beside it."""

import math
import os
import re
from collections import defaultdict
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

import jinja2
import numpy as np
import torch
from detectron2.data import MetadataCatalog

from ssimkd.checkpoint.export import read_weights
from ssimkd.checkpoint.reader import fetch
from ssimkd.engine.run_record import in_words, machine, now
from ssimkd.errors import ConfigError
from ssimkd.evaluation.similarity import similarity_maps
from ssimkd.modeling.several_teachers import distillers_of

from . import charts, images
from .config_diff import differences
from .detection_errors import KINDS, DetectionErrors, detection_errors
from .detectors import Detector, load_detectors
from .model_cost import costs, speeds
from .run import Run

SAMPLE = 24  # validation images on which student and teacher are compared
SHOWN = 3  # of them are shown at equal distances, and as many of the least similar ones
TIMED = 5  # of them are used to time the detectors
CURVES = {  # heading -> the scalars below it
    "Losses": r"[^/]*loss[^/]*",
    "Distillation by level, before its weight": r".*_kd/.*",
    "AP and learning rate": r"lr|(.*/)?(bbox|segm|keypoints)/AP",
}
ADAPTER = re.compile(r"distiller\.([^.]+\.)?adapters\.")  # of one teacher, or of several


class Report:
    """Everything that the page says about a run and the runs that it is compared with.

    Args:
        run (Run): the run.
        others (list[Run]): students with or without a teacher, or evaluations of its teachers.

    Attributes:
        notes (list[str]): sentences that say what is left out and why.
        levels (dict[str, list[float]]): level -> for each image of the sample, the SSIM of student
            and teacher. It is empty if they cannot be compared.
    """

    def __init__(self, run: Run, others: List[Run]) -> None:
        self.run = run
        self.notes: List[str] = []
        self.detectors = load_detectors(run, others, self.notes)
        self.own = self.detectors[0]
        self.colour = charts.colours([d.label for d in self.detectors])
        step = max(1, len(run.images) // SAMPLE)
        self.sample = run.images[::step][:SAMPLE] if self.own.model is not None else []
        self.names = [record["file_name"] for record in self.sample]
        self.levels = self.compare_maps()
        if not run.results:
            self.notes.append("This run was not evaluated, or its results.json is not complete.")
        for d in self.detectors[1:]:
            if d.run and d.run.dataset != run.dataset:
                self.notes.append(
                    f"{d.label} was evaluated on {d.run.dataset or 'nothing'}, not on "
                    f"{run.dataset}: its AP and its errors are not compared."
                )

    def compare_maps(self) -> Dict[str, List[float]]:
        """Measures :attr:`levels`, or adds a note that says why it cannot."""
        if self.own.model is None:
            return {}
        if not self.own.distils:
            self.notes.append("This run has no teacher, so there are no maps to compare.")
            return {}
        kept = read_weights(fetch(self.run.weights))
        if not adapters_in(self.own.model.state_dict()) <= adapters_in(kept):
            self.notes.append(f"Maps are not compared: {self.run.weights} lacks the adapters.")
            return {}
        levels: Dict[str, List[float]] = defaultdict(list)
        try:
            for name in self.names:
                maps = similarity_maps(self.own.model, self.own.read(name))
                for level, by_name in maps.items():
                    levels[level].append(float(np.nanmean(by_name["SSIM"])))
        except ConfigError as error:
            self.notes.append(f"Maps are not compared: {error}")
            return {}
        return levels

    @property
    def runs(self) -> Dict[str, Run]:
        """The runs by label."""
        return {d.label: d.run for d in self.detectors if d.run is not None}

    @property
    def comparable(self) -> Dict[str, Run]:
        """The runs by label that were evaluated on the same data as the run of this page."""
        return {label: r for label, r in self.runs.items() if r.dataset == self.run.dataset}

    def what(self) -> Dict[str, str]:
        """What was trained, in words."""
        model = self.own.model
        words = {"student": "not known"}
        if model is not None:
            backbone = getattr(model, "backbone", None)
            parts = [model, backbone, getattr(backbone, "bottom_up", None)]
            words["student"] = ", ".join(type(part).__name__ for part in parts if part is not None)
        for name, distiller in distillers_of(model):
            if distiller.enabled:
                spec = distiller.spec
                losses = [f"{x.name} (weight {x.weight:g})" for x in distiller.losses.values()]
                words[f"teacher {name}".rstrip()] = f"{spec.config}, {spec.weights or 'of the zoo'}"
                words[f"distilled {name}".rstrip()] = (
                    f"{', '.join(losses)} on {', '.join(distiller.in_features)}, "
                    f"adapter {distiller.adapter}"
                )
        words["trained on"] = self.run.trained
        words["evaluated on"] = self.run.dataset or "nothing"
        words["ended"] = self.run.ended
        for entry in (self.run.training or self.run.record)[-1:]:
            words["command"] = entry["command"]
            words["commit"] = entry["commit"] or "not known"
            words["machine"] = entry["machine"]
        return words

    def rows(self) -> List[Dict[str, Any]]:
        """The first table has a row for each detector, with its AP and its costs."""
        speed = speeds(self.detectors, self.names[:TIMED])
        return [
            {
                "detector": d,
                "results": d.run.results.get("bbox", {}) if d.run else {},
                "speed": speed.get(d.label),
                **costs(d, self.names[0] if self.names else ""),
            }
            for d in self.detectors
        ]

    def curves(self) -> Dict[str, List[str]]:
        """Heading -> its charts over iterations. Each chart has the curves of all runs."""
        names = sorted({name for run in self.runs.values() for name in run.scalars})
        kinds = {
            kind: [self.curve(name) for name in names if re.fullmatch(pattern, name)]
            for kind, pattern in CURVES.items()
        }
        return {kind: found for kind, found in kinds.items() if found}

    def curve(self, name: str) -> str:
        """The chart of one scalar. The AP of a run that was only evaluated is a dashed line."""
        task, _, metric = name.rpartition("/")
        runs = self.comparable if metric == "AP" else self.runs
        series = {label: run.scalars[name] for label, run in runs.items() if name in run.scalars}
        found = {label: run.results.get(task, {}).get(metric) for label, run in runs.items()}
        levels = {k: ap for k, ap in found.items() if ap is not None and k not in series}
        return charts.lines(name, series, self.colour, levels)

    def chosen(self) -> Dict[int, str]:
        """The images of the sample that are shown: index -> a remark, which may be empty."""
        count = len(self.sample)
        found = dict.fromkeys(list(range(0, count, max(1, count // SHOWN)))[:SHOWN], "")
        if self.levels:
            means = np.mean(list(self.levels.values()), axis=0)
            rest = [int(i) for i in np.argsort(means, kind="stable") if i not in found]
            found.update(dict.fromkeys(rest[:SHOWN], f"among the least similar of {count}"))
        return found

    def images(self) -> List[Dict[str, Any]]:
        """The pictures of each image that is shown."""
        metadata = MetadataCatalog.get(self.run.dataset) if self.sample else None
        found = []
        for index, remark in self.chosen().items():
            name = self.names[index]
            pictures = images.draw_image(self.sample[index], self.detectors, metadata)
            found.append(
                {
                    "name": os.path.basename(name),
                    "remark": remark,
                    "pictures": {label: images.data_url(p) for label, p in pictures.items()},
                    "maps": images.data_url(images.draw_maps(self.own, name))
                    if self.levels
                    else "",
                }
            )
        return found

    def twin(self) -> Optional[Detector]:
        """The first other run that was trained on the same data without a teacher."""
        others = [d for d in self.detectors[1:] if d.label in self.comparable and not d.teaches]
        return next((d for d in others if d.model is not None and not d.distils), None)

    def tasks(self) -> Dict[str, Dict[str, Any]]:
        """The results of the last evaluations: task -> labels, and a row for each metric."""
        twin = self.twin() if self.own.distils else None
        teacher = next((d for d in self.detectors if d.teaches and d.run), None)
        found = {}
        for task, own in self.run.results.items():
            results = {k: run.results.get(task, {}) for k, run in self.comparable.items()}
            rows = {}
            for metric, value in own.items():
                values = {label: r.get(metric) for label, r in results.items()}
                others = (values.get(d.label) if d else None for d in (twin, teacher))
                rows[metric] = values, *gap(value, *others)
            found[task] = {"labels": list(results), "rows": rows}
        return found

    def errors(self) -> Dict[str, DetectionErrors]:
        """Label -> the errors of that run, if it was evaluated on the same data."""
        objects = self.run.objects if self.run.detections is not None else None
        if objects is None:
            return {}
        return {
            label: detection_errors(objects, run.detections)
            for label, run in self.comparable.items()
            if run.detections is not None
        }

    def html(self) -> str:
        """The page."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader(__package__, ""),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.filters.update(number=number, in_words=in_words)
        twin, errors = self.twin(), self.errors()
        error_costs = {label: list(e.costs.values()) for label, e in errors.items()}
        students = {d.label: d.run for d in self.detectors if d.run is not None and not d.teaches}
        alike = {label: r for label, r in students.items() if r.lazy == self.run.lazy}
        content = {  # before the notes, because it adds some
            "rows": self.rows(),
            "curves": self.curves(),
            "images": self.images(),
            "tasks": self.tasks(),
            "settings": differences(list(alike.values())) if len(alike) > 1 else [],
        }
        return environment.get_template("page.html").render(
            **content,
            notes=[*self.notes, *(note for run in self.runs.values() for note in run.notes)],
            run=self.run,
            runs=self.runs,
            alike=list(alike),
            what=self.what(),
            colour=self.colour,
            levels=self.levels,
            twin=twin.label if twin and self.own.distils else "",
            errors=errors,
            error_costs=errors
            and charts.bars("Cost of errors in AP50", KINDS, error_costs, self.colour),
            kinds=KINDS,
            least_score=images.LEAST_SCORE,
            sample=len(self.sample),
            threads=torch.get_num_threads(),
            machine=machine(),
            made=in_words(now()),
        )


def adapters_in(weights: Mapping[str, Any]) -> Set[Tuple[str, torch.Size]]:
    """The names and shapes of the adapters in the state dict of a student."""
    return {(name, x.shape) for name, x in weights.items() if ADAPTER.match(name)}


def gap(
    student: Optional[float], twin: Optional[float], teacher: Optional[float]
) -> Tuple[Optional[float], Optional[float]]:
    """The student's gain on its twin, and the share of the teacher's lead that it is in percent.

    The twin was trained without a teacher. Either number is None if a value that it needs is
    missing. The share is None if the teacher is not better than the twin.
    """
    if student is None or twin is None:
        return None, None
    gain = student - twin
    if teacher is None or teacher <= twin:
        return gain, None
    return gain, 100 * gain / (teacher - twin)


def number(value: Optional[float], digits: int = 1) -> str:
    """A value as the page writes it, or a dash if it is not known."""
    known = value is not None and not math.isnan(value)
    return f"{value:.{digits}f}" if known else "\N{EN DASH}"
