"""The report of runs: one HTML file that needs nothing beside it."""

import os
import re
import shlex
import statistics
from collections import defaultdict
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import jinja2
import numpy as np
import torch

from ssimkd.checkpoint.reader import fetch, read_weights
from ssimkd.data.datasets import classes_of
from ssimkd.engine.run_record import end_of, in_words, machine, now
from ssimkd.errors import ConfigError, one_line
from ssimkd.evaluation.similarity import similarity_maps
from ssimkd.modeling.several_teachers import distillers_of
from ssimkd.utils.config_keys import names_of, setting
from ssimkd.utils.lazy_fields import lazy_fields

from . import charts, images
from .config_diff import differences
from .detection_errors import KINDS, DetectionErrors, detection_errors
from .detectors import HEAD, Detector, load_detectors
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
    """Everything that the page says about runs.

    Args:
        runs (list[Run]): the page is about the first one. The others are students with or without
            a teacher, or evaluations of its teachers.

    Attributes:
        detectors (list[Detector]): the first run's, its vanilla twin, other ones, its teachers.
        twin (Detector or None): the same student, trained without a teacher on the same labelled
            images, with the same batch and number of iterations.
        notes (list[str]): sentences that say what is left out and why.
        levels (dict[str, list[float]]): level -> for each image of the sample, the SSIM of student
            and teacher. It is empty if they cannot be compared.
    """

    def __init__(self, runs: List[Run]) -> None:
        self.run = run = runs[0]
        self.notes: List[str] = []
        self.own, *others = load_detectors(runs, self.notes)
        self.twin = self.find_twin(others)
        others.sort(key=lambda d: (d is not self.twin, d.teaches))
        self.detectors = [self.own, *others]
        self.colour = charts.colours([d.label for d in self.detectors])
        self.sample = self.read_sample() if self.own.model is not None else []
        self.names = [record["file_name"] for record in self.sample]
        for detector in self.detectors:
            self.try_once(detector)
        self.levels = self.compare_maps()
        if not run.results:
            self.notes.append("This run was not evaluated, or its results.json is not complete.")
        for d in others:
            if d.runs and d not in self.comparable:
                data = f"other data called {d.dataset}" if d.runs[0].other_data else d.dataset
                self.notes.append(
                    f"{d.label} was evaluated on {data or 'nothing'}, not on {run.dataset}: "
                    "its AP and its errors are not compared."
                )

    def find_twin(self, others: List[Detector]) -> Optional[Detector]:
        """The first other detector of the same architecture and training without a teacher."""
        if not self.own.distils:
            return None
        found = (d for d in others if d.runs and not d.teaches and not d.distils)
        alike = (d for d in found if d.architecture == self.own.architecture)
        schedule = schedule_of(self.run)
        return next(
            (
                d
                for d in alike
                if d.dataset == self.run.dataset
                and not d.runs[0].other_data
                and d.runs[0].has_trained
                and schedule_of(d.runs[0]) == schedule
            ),
            None,
        )

    def read_sample(self) -> List[Dict[str, Any]]:
        """Records of validation images at equal distances, without those that cannot be read."""
        step, found = max(1, len(self.run.images) // SAMPLE), []
        for record in self.run.images[::step][:SAMPLE]:
            try:
                self.own.read(record["file_name"])
            except ConfigError as error:
                self.notes.append(f"An image is left out: {error}")
            else:
                found.append(record)
        return found

    def try_once(self, detector: Detector) -> None:
        """Finds out whether a detector needs an operator that is missing here."""
        try:
            if detector.model is not None and self.names:
                detector.detect(self.names[0])
        except (ImportError, NotImplementedError) as error:
            self.notes.append(
                f"Pictures and measurements of {detector.label} are left out, because an operator "
                f"that Detectron2 compiles is missing: {one_line(error)}"
            )
            detector.runs_here = False

    def compare_maps(self) -> Dict[str, List[float]]:
        """Measures :attr:`levels`, or adds a note that says why it cannot."""
        if self.own.model is None or not self.own.runs_here:
            return {}
        if not self.own.distils:
            self.notes.append("This run has no teacher, so there are no maps to compare.")
            return {}
        if not any(distiller.compares_maps for _, distiller in distillers_of(self.own.model)):
            self.notes.append("Maps are not compared, because no loss of this run compares them.")
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
        except (ConfigError, ImportError, NotImplementedError) as error:
            why = error if isinstance(error, ConfigError) else one_line(error)
            self.notes.append(f"Maps are not compared: {why}")
            return {}
        return levels

    @property
    def comparable(self) -> List[Detector]:
        """The detectors that were evaluated on the same data as the run of this page."""
        with_runs = [d for d in self.detectors if d.runs and d.dataset == self.run.dataset]
        return [d for d in with_runs if not d.runs[0].other_data]

    def what(self) -> Dict[str, str]:
        """What was trained, in words."""
        words = {}
        for name, distiller in distillers_of(self.own.model):
            if distiller.enabled:
                spec = distiller.spec
                losses = [f"{x.name} (weight {x.weight:g})" for x in distiller.losses.values()]
                words[f"teacher {name}".rstrip()] = f"{spec.config}, {spec.weights or 'of the zoo'}"
                where = ""
                if distiller.compares_maps:
                    levels = ", ".join(distiller.in_features)
                    where = f" on {levels}, adapter {distiller.adapter}"
                words[f"distilled {name}".rstrip()] = ", ".join(losses) + where
        return {**words, "trained on": self.run.trained, "run": self.run.ended}

    def rows(self) -> List[Dict[str, Any]]:
        """The first table has a row for each detector: its AP, its training and its costs."""
        speed = speeds(self.detectors, self.names[:TIMED])
        teacher = next((d for d in self.comparable if d.teaches), None)
        rows = []
        for d in self.detectors:
            share = None
            if d in self.comparable and d.distils and self.twin:
                share = gap(
                    *(mean(x.values("bbox", "AP")) if x else None for x in (d, self.twin, teacher))
                )
            rows.append(
                {
                    "detector": d,
                    "ap": {m: d.values("bbox", m) if d in self.comparable else [] for m in HEAD},
                    "share": share,
                    "seconds": mean(
                        [s for run in d.runs for s in run.scalars.get("time", ((), ()))[1]]
                    ),
                    "speed": speed.get(d.label),
                    **costs(d, self.names[0] if self.names else ""),
                }
            )
        return rows

    def curves(self) -> Dict[str, List[str]]:
        """Heading -> its charts over iterations. Each chart has the curves of all runs."""
        names = sorted({name for d in self.detectors for run in d.runs for name in run.scalars})
        kinds = {
            kind: [self.curve(name) for name in names if re.fullmatch(pattern, name)]
            for kind, pattern in CURVES.items()
        }
        return {kind: found for kind, found in kinds.items() if found}

    def curve(self, name: str) -> str:
        """The chart of one scalar."""
        detectors = self.comparable if name.endswith("/AP") else self.detectors
        series = {
            d.label: [run.scalars[name] for run in d.runs if name in run.scalars] for d in detectors
        }
        return charts.lines(name, series, self.colour)

    def chosen(self) -> Dict[int, str]:
        """The images of the sample that are shown: index -> a remark, which may be empty."""
        count = len(self.sample)
        found = dict.fromkeys(list(range(0, count, max(1, count // SHOWN)))[:SHOWN], "")
        if self.levels:
            means = np.mean(list(self.levels.values()), axis=0)
            rest = [int(i) for i in np.argsort(means, kind="stable") if i not in found]
            found.update(dict.fromkeys(rest[:SHOWN], f"among the least similar of {count}"))
        return found

    def classes(self) -> Dict[str, str]:
        """Name of each class -> its colour in the pictures of the truth."""
        names = classes_of(self.run.dataset)
        return {name: images.class_colour(label) for label, name in enumerate(names)}

    def images(self) -> List[Dict[str, Any]]:
        """The pictures of each image that is shown: of the truth, vanilla, student, teacher."""
        found = []
        shown = sorted(self.detectors, key=lambda d: (d.teaches, d is self.own, d is not self.twin))
        shown = [d for d in shown if d.model is not None and d.runs_here]
        names = classes_of(self.run.dataset) if self.sample else []
        for d in [d for d in shown if not d.has_classes(names)]:
            shown.remove(d)
            self.notes.append(
                f"Pictures of {d.label} are left out: its classes are not those of "
                f"{self.run.dataset}."
            )
        for index, remark in self.chosen().items():
            record, name = self.sample[index], self.names[index]
            seen = {d.label: d.detect(name) for d in shown}
            kept = {k: x[x.scores >= images.LEAST_SCORE] for k, x in seen.items() if x is not None}
            pictures = {
                label: images.data_url(images.draw(record, x, names))
                for label, x in {"truth": None, **kept}.items()
            }
            maps = ""
            if self.levels:
                maps = images.data_url(images.draw_maps(self.own, name))
            shows = {"name": os.path.basename(name), "remark": remark}
            found.append({**shows, "pictures": pictures, "maps": maps})
        return found

    def tasks(self) -> Dict[str, Dict[str, Any]]:
        """The results of the last evaluations: task -> metric -> values by label, and the gain."""
        found: Dict[str, Dict[str, Any]] = {}
        for task, own in self.run.results.items():
            rows = found[task] = {}
            for metric in own:
                values = {d.label: d.values(task, metric) for d in self.comparable}
                student, twin = (
                    mean(values[d.label]) if d else None for d in (self.own, self.twin)
                )
                unknown = student is None or twin is None
                rows[metric] = values, None if unknown else student - twin  # type: ignore[operator]
        return found

    def errors(self) -> Dict[str, DetectionErrors]:
        """Label -> the errors of its first run, if it was evaluated on the same data."""
        objects = self.run.objects if self.run.detections is not None else None
        if objects is None:
            return {}
        return {
            d.label: detection_errors(objects, d.runs[0].detections)
            for d in self.comparable
            if d.runs[0].detections is not None
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
        environment.filters.update(
            number=number, in_words=in_words, end_of=end_of, quote=shlex.quote
        )
        students = [d for d in self.detectors if d.runs and not d.teaches]
        alike = {d.label: d.runs[0] for d in students if d.runs[0].lazy == self.run.lazy}
        runs = [run for d in self.detectors for run in d.runs]
        content = {  # before the notes, because it adds some
            "rows": self.rows(),
            "curves": self.curves(),
            "images": self.images(),
            "tasks": self.tasks(),
            "errors": self.errors(),
            "settings": differences(list(alike.values())) if len(alike) > 1 else [],
        }
        return environment.get_template("page.html").render(
            **content,
            notes=[
                lazy_fields(note) if run.lazy else note
                for run, notes in ((self.run, self.notes), *((run, run.notes) for run in runs))
                for note in notes
            ],
            title=self.own.label,
            run=self.run,
            runs=runs,
            alike=list(alike),
            what=self.what(),
            colour=self.colour,
            classes=self.classes() if self.sample else {},
            marks={"hit": images.HIT, "miss": images.MISS, "false alarm": images.FALSE_ALARM},
            levels=self.levels,
            twin=self.twin.label if self.twin else "",
            kinds=KINDS,
            least_score=images.LEAST_SCORE,
            labelled=images.LABELLED,
            sample=len(self.sample),
            threads=torch.get_num_threads(),
            machine=machine(),
            made=in_words(now()),
        )


def schedule_of(run: Run) -> Tuple[Any, ...]:
    """The labelled training images of a run, its batch of them, and its iterations."""
    batch, iterations = setting(run.cfg, "batch"), setting(run.cfg, "iterations")
    return sorted(names_of(run.cfg, "TRAIN")), batch, iterations


def adapters_in(weights: Mapping[str, Any]) -> Set[Tuple[str, torch.Size]]:
    """The names and shapes of the adapters in the state dict of a student."""
    return {(name, x.shape) for name, x in weights.items() if ADAPTER.match(name)}


def gap(
    student: Optional[float], twin: Optional[float], teacher: Optional[float]
) -> Optional[float]:
    """The share of the teacher's lead over the twin that a student has gained, in percent.

    The twin was trained without a teacher. The share is 100 for a student that is better than its
    teacher. It is None if a value is missing, or if the teacher is not better than the twin.
    """
    if student is None or twin is None or teacher is None or teacher <= twin:
        return None
    return min(100 * (student - twin) / (teacher - twin), 100.0)


def mean(values: Sequence[float]) -> Optional[float]:
    """The mean, or None of no values."""
    return statistics.fmean(values) if values else None


def number(value: Any, digits: int = 1) -> str:
    """A value as the page writes it; mean +- standard deviation of several; a dash for none."""
    values = [x for x in (value if isinstance(value, list) else [value]) if x is not None]
    if not values or np.isnan(values).any():
        return "\N{EN DASH}"
    parts = [statistics.fmean(values), *([statistics.stdev(values)] if values[1:] else [])]
    return " \N{PLUS-MINUS SIGN} ".join(f"{part:.{digits}f}" for part in parts)
