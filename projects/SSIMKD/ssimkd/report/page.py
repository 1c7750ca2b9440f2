"""The report of a run: one HTML file that needs nothing beside it."""

import math
import os
import re
from typing import Any, Dict, List, Mapping, Optional

import jinja2
import numpy as np
from PIL import Image
from torch import nn

from ..meta_arch import image_format_of
from ..preflight import distillers_of
from ..run_record import machine, now
from ..similarity_maps import NAMES, render, similarity_maps
from . import charts, pictures
from .detection_errors import KINDS, DetectionErrors, detection_errors
from .detector import detectors_of
from .differences import differences
from .run import Run, Series
from .similarity import measure_levels

SAMPLE = 24  # validation images that are looked at
SHOWN = 3  # of them, at equal distances, and as many that are the least similar
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


class Report:
    """Everything that the page says about a run and those that it is compared with.

    Args:
        run (Run): the run.
        others (list[Run]): its twin without teacher, evaluations of its teachers, more students.
    """

    def __init__(self, run: Run, others: List[Run]) -> None:
        self.run = run
        self.notes: List[str] = []
        self.detectors = detectors_of(run, others, self.notes)
        self.model: Optional[nn.Module] = self.detectors[0].model
        self.shown = image_format_of(self.model)
        self.samples = run.samples(SAMPLE) if self.model is not None else []
        self.inputs = [x for _, x in self.samples]
        pairs = sum(distiller.enabled for _, distiller in distillers_of(self.model))
        loaded = sum(d.label.startswith("teacher") for d in self.detectors)
        self.levels = measure_levels(self.model, self.inputs) if loaded == pairs else {}
        self.colour = charts.colours([d.label for d in self.detectors])
        if self.model is not None and not pairs:
            self.notes.append("This run has no teacher: what compares it with one is left out.")
        if not run.results:
            self.notes.append("This run was not evaluated: there is no results.json.")

    @property
    def runs(self) -> Dict[str, Run]:
        """The runs by label."""
        return {d.label: d.run for d in self.detectors if d.run is not None}

    def what(self) -> Dict[str, str]:
        """What was trained, in words."""
        words = {"student": type(self.model).__name__ if self.model is not None else "not known"}
        for name, distiller in distillers_of(self.model):
            if not distiller.enabled:
                continue
            spec = distiller.spec
            losses = [f"{loss.name} (weight {loss.weight:g})" for loss in distiller.losses.values()]
            words[f"teacher {name}".rstrip()] = f"{spec.config}, {spec.weights or 'of the zoo'}"
            words[f"losses {name}".rstrip()] = ", ".join(losses)
            words[f"levels {name}".rstrip()] = (
                f"{', '.join(distiller.in_features)}; adapter: {distiller.adapter}"
            )
        iterations = self.run.scalars.get("iteration", ([], []))[0]
        words["iterations"] = str(iterations[-1]) if iterations else "not known"
        words["evaluated on"] = self.run.dataset or "nothing"
        words["ended"] = self.run.ended
        return words

    def head(self) -> List[Dict[str, Any]]:
        """A row per detector: AP and costs."""
        rows = []
        for d in self.detectors:
            results = d.run.results.get("bbox", {}) if d.run else {}
            row = {key: results.get(key) for key in ("AP", "AP50", "AP75")}
            folder = d.run.folder if d.run else ""
            rows.append(
                {"label": d.label, "folder": folder, **row, **d.measure(self.inputs, self.shown)}
            )
        return rows

    def curves(self) -> Dict[str, List[str]]:
        """Charts over iterations: a heading -> its charts, all runs in each."""
        names = sorted({name for run in self.runs.values() for name in run.scalars})
        kinds = {
            "Losses": [n for n in names if "loss" in n and "/" not in n],
            "Distillation by level, not weighted": [n for n in names if "_kd/" in n],
            "AP and learning rate": [
                n for n in names if re.search(r"^lr$|(^|/)(bbox|segm|keypoints)/AP$", n)
            ],
        }
        return {kind: [self.curve(n) for n in found] for kind, found in kinds.items() if found}

    def curve(self, name: str) -> str:
        """The chart of one scalar."""
        series = {
            label: run.scalars[name] for label, run in self.runs.items() if name in run.scalars
        }
        task, _, metric = name.partition("/")
        found = {label: run.results.get(task, {}).get(metric) for label, run in self.runs.items()}
        levels = {
            label: ap for label, ap in found.items() if ap is not None and label not in series
        }
        return charts.lines(name, series, self.colour, levels)

    def similarity_curves(self) -> Dict[str, Series]:
        """SSIM by level over the training: what the logged loss (1 - SSIM) / 2 says."""
        return {
            name.replace("ssim_kd/", ""): (x, [1 - 2 * v for v in y])
            for name, (x, y) in sorted(self.run.scalars.items())
            if re.search(r"(^|/)ssim_kd/", name)
        }

    def similarity(self) -> Dict[str, Any]:
        """Section 4: charts, and a row per level."""
        curves = self.similarity_curves()
        colour = charts.colours([*dict.fromkeys([*curves, *self.levels])], len(self.colour))
        return {
            "colour": colour,
            "curve": charts.lines("SSIM by level in training", curves, colour, {})
            if curves
            else "",
            "histograms": [
                charts.histogram(f"{level}: channels by SSIM", found.channels, colour[level])
                for level, found in self.levels.items()
            ],
            "levels": self.levels,
        }

    def chosen(self) -> List[Dict[str, Any]]:
        """The images that are shown: indices of the sample, and why."""
        step = max(1, len(self.samples) // SHOWN)
        ret = [{"index": i, "why": ""} for i in range(0, len(self.samples), step)][:SHOWN]
        if self.levels:
            means = [
                sum(lv.images[i] for lv in self.levels.values()) / len(self.levels)
                for i in range(len(self.samples))
            ]
            least = sorted(range(len(means)), key=means.__getitem__)
            taken = {c["index"] for c in ret}
            ret += [
                {"index": i, "why": "among the least similar"} for i in least if i not in taken
            ][:SHOWN]
        return ret

    def detections(self, index: int) -> Dict[str, pictures.Picture]:
        """One image: the truth, every detector's boxes, and where the maps differ most."""
        record, x = self.samples[index]
        shown = {"ground truth": pictures.draw_truth(record, self.run.dataset)}
        for d in self.detectors:
            if d.model is not None:
                shown[d.label] = pictures.draw_detections(
                    record, x, d, self.run.dataset, self.shown
                )
        if self.levels:
            image = pictures.as_rgb(x, self.shown)
            maps = similarity_maps(self.model, x)
            shown["where maps differ"] = pictures.draw_most_different(maps, image)
        return shown

    def images(self) -> List[Dict[str, Any]]:
        """Section 3, first part."""
        return [
            {
                "name": os.path.basename(self.samples[c["index"]][0]["file_name"]),
                "why": c["why"],
                "pictures": {
                    label: pictures.data_url(picture)
                    for label, picture in self.detections(c["index"]).items()
                },
            }
            for c in self.chosen()
        ]

    def maps(self) -> List[Dict[str, Any]]:
        """Section 3, second part: the maps of the first image and of the least similar one."""
        if not self.levels:
            return []
        chosen = [c["index"] for c in self.chosen()]
        least = next((i["index"] for i in self.chosen() if i["why"]), chosen[0])
        ret = []
        for index in dict.fromkeys([chosen[0], least]):
            record, x = self.samples[index]
            image = pictures.as_rgb(x, self.shown)
            drawn, scale = pictures.draw_maps(similarity_maps(self.model, x), image)
            ret.append(
                {
                    "name": os.path.basename(record["file_name"]),
                    "image": pictures.data_url(image),
                    "levels": {
                        level: {name: pictures.data_url(p) for name, p in by_name.items()}
                        for level, by_name in drawn.items()
                    },
                    "scale": scale,
                }
            )
        return ret

    def gains(self) -> Dict[str, Any]:
        """Section 5: AP by size and class, and error types."""
        results = {
            label: run.results["bbox"] for label, run in self.runs.items() if "bbox" in run.results
        }
        own = results.get(self.detectors[0].label, {})
        classes = [key for key in own if key.startswith("AP-")]
        errors = self.errors()
        return {
            "results": results,
            "sizes": SIZES,
            "classes": classes,
            "errors": errors,
            "kinds": KINDS,
            "charts": [
                *self.bars("AP by size of the object", SIZES, results),
                *self.bars("AP by class", {c: c[3:] for c in classes[:10]}, results),
                *self.bars("Cost of errors in AP50", {k: k for k in KINDS}, {
                    label: e.costs for label, e in errors.items()
                }),
            ],
        }  # fmt: skip

    def bars(
        self,
        title: str,
        groups: Mapping[str, str],
        values: Mapping[str, Mapping[str, Optional[float]]],
    ) -> List[str]:
        """A chart of bars, or none where there is nothing to show."""
        if not (groups and values):
            return []
        heights = {label: [found.get(g) or 0.0 for g in groups] for label, found in values.items()}
        return [charts.bars(title, list(groups.values()), heights, self.colour)]

    def errors(self) -> Dict[str, DetectionErrors]:
        """Error types of every run that left its detections on the same data."""
        objects = self.run.objects if self.run.dataset and self.run.detections is not None else None
        if objects is None:
            return {}
        return {
            label: detection_errors(objects, run.detections)
            for label, run in self.runs.items()
            if run.detections is not None and run.dataset == self.run.dataset
        }

    def settings(self) -> Dict[str, Any]:
        """Section 6: what makes the run again."""
        kept = {
            d.label: d.run
            for d in self.detectors
            if d.run is not None
            and d.run.lazy == self.run.lazy
            and not d.label.startswith("teacher")
        }
        return {
            "records": {label: run.record for label, run in self.runs.items()},
            "labels": list(kept),
            "differences": differences(list(kept.values())),
            "base": "the file that the command names"
            if self.run.lazy
            else "the defaults of Detectron2 and SSIMKD",
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
        environment.filters["number"] = number
        return environment.get_template("page.html").render(
            run=self.run,
            what=self.what(),
            rows=self.head(),
            colour=self.colour,
            curves=self.curves(),
            scalars={label: run.scalars for label, run in self.runs.items() if run.scalars},
            images=self.images(),
            maps=self.maps(),
            names=NAMES,
            similarity=self.similarity(),
            gains=self.gains(),
            settings=self.settings(),
            notes=self.notes,
            sample=len(self.samples),
            shown_score=pictures.SHOWN_SCORE,
            machine=machine(),
            made=now(),
        )

    def save_pictures(self, folder: str) -> List[str]:
        """Writes small PNGs for a README; returns their paths.

        detections.png: images with the truth and every detector's boxes. similarity.png, of a run
        with a teacher: the maps of the first image.
        """
        os.makedirs(folder, exist_ok=True)
        found = {}
        if self.samples:
            rows = [pictures.side_by_side(self.detections(c["index"])) for c in self.chosen()]
            found["detections.png"] = np.vstack(rows[:SHOWN])
        if self.levels:
            x = self.inputs[0]
            image = pictures.as_rgb(x, self.shown)
            found["similarity.png"] = render(similarity_maps(self.model, x), image)
        paths = [os.path.join(folder, name) for name in found]
        for path, picture in zip(paths, found.values()):
            small = Image.fromarray(picture).quantize(256, Image.Quantize.FASTOCTREE)
            small.save(path, optimize=True)
        return paths


def number(value: Optional[float], digits: int = 1) -> str:
    """A value as the page writes it; a dash where it is not known."""
    known = value is not None and not math.isnan(value)
    return f"{value:.{digits}f}" if known else "\N{EN DASH}"
