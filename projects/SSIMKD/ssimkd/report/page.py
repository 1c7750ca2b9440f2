"""The report of a run: one HTML file that needs nothing beside it."""

import math
import os
import re
from functools import cached_property
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

import jinja2
import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from PIL import Image
from torch import nn

from ssimkd.checkpoint.export import read_weights
from ssimkd.checkpoint.reader import fetch
from ssimkd.engine.run_record import in_words, machine, now
from ssimkd.evaluation.similarity import NAMES, gradient, render, similarity_maps
from ssimkd.modeling.meta_arch import image_format_of
from ssimkd.modeling.several_teachers import distillers_of

from . import charts
from . import images as pictures
from .config_diff import config_file, differences
from .detection_errors import KINDS, DetectionErrors, detection_errors
from .loss_maps import measure_levels
from .model_cost import TIMED, detectors_of, speeds
from .run import Run, Series

SAMPLE = 24  # validation images that are looked at
SHOWN = 3  # of them, at equal distances, and as many that are the least similar
BOOKKEEPING = re.compile(r"^(iteration|eta_seconds|(rank_)?(data_)?time|images_per_second)$")
ADAPTER = re.compile(r"distiller\.([^.]+\.)?adapters\.")  # one, or of several teachers
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
        loaded = sum(d.teaches for d in self.detectors)
        adapters = adapters_in(self.model.state_dict()) if self.model is not None else set()
        lost = bool(adapters) and not adapters <= adapters_in(read_weights(fetch(run.weights)))
        compared = loaded == pairs and not lost
        self.levels = measure_levels(self.model, self.inputs) if compared else {}
        self.colour = charts.colours([d.label for d in self.detectors])
        if self.model is not None and not pairs:
            self.notes.append("This run has no teacher: what compares it with one is left out.")
        if lost:
            self.notes.append(
                f"Maps are not compared: the checkpoint {run.weights} does not hold the adapters."
            )
        if not run.results:
            self.notes.append("This run was not evaluated: there is no results.json.")
        if run.training and run.training[-1] is not run.record[-1]:
            self.notes.append(
                "config.yaml is of the last command, an evaluation: so are the settings below."
            )

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
        backbone = getattr(self.model, "backbone", None)
        if backbone is not None:
            parts = [backbone, getattr(backbone, "bottom_up", None)]
            words["backbone"] = " on ".join(type(part).__name__ for part in parts if part)
            if not self.run.lazy and "resnet" in self.run.cfg.MODEL.BACKBONE.NAME:
                words["backbone"] += f"-{self.run.cfg.MODEL.RESNETS.DEPTH}"
        words["config file"] = config_file(self.run) or "not known"
        if not self.run.only_evaluated:
            words["trained on"] = f"{self.run.trained_on}, {self.run.seen}"
            words["training time"] = self.run.training_time
        words["evaluated on"] = self.run.dataset or "nothing"
        words["ended"] = self.run.ended
        return words

    def head(self) -> List[Dict[str, Any]]:
        """A row per detector: AP and costs."""
        rows = []
        speed = speeds(self.detectors, self.inputs, self.shown)
        for d in self.detectors:
            results = d.run.results.get("bbox", {}) if d.run else {}
            rows.append(
                {
                    "label": d.label,
                    "folder": d.run.folder if d.run else "",
                    "dataset": d.run.dataset if d.run and results else "",
                    "file": d.file(),
                    "speed": speed.get(d.label),
                    **{key: results.get(key) for key in ("AP", "AP50", "AP75")},
                    **d.measure(self.inputs),
                }
            )
        return rows

    def comparable(self, run: Run) -> bool:
        """Whether a run was evaluated on the data of this page's run."""
        return run.dataset == self.run.dataset

    def elsewhere(self) -> List[str]:
        """What a section on the data of this page's run leaves out, in words."""
        return [
            f"{label} (evaluated on {run.dataset or 'nothing'})"
            for label, run in self.runs.items()
            if not self.comparable(run)
        ]

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
        if metric:
            series = {label: s for label, s in series.items() if self.comparable(self.runs[label])}
        found = {
            label: run.results.get(task, {}).get(metric)
            for label, run in self.runs.items()
            if self.comparable(run)
        }
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
            shown["where maps differ"] = pictures.draw_most_different(
                similarity_maps(self.model, x), self.most_different
            )
        return shown

    @cached_property
    def most_different(self) -> float:
        """The largest value of 1 - SSIM, mean of the levels, in the images that are shown."""
        return max(
            float(np.nanmax(pictures.most_different(similarity_maps(self.model, x))[0]))
            for x in (self.inputs[c["index"]] for c in self.chosen())
        )

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
            image = convert_image_to_rgb(x["image"].permute(1, 2, 0), self.shown)
            drawn, scale = pictures.draw_maps(similarity_maps(self.model, x))
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
            label: run.results["bbox"]
            for label, run in self.runs.items()
            if "bbox" in run.results and self.comparable(run)
        }
        own = results.get(self.detectors[0].label, {})
        classes = [key for key in own if key.startswith("AP-")]
        errors = self.errors()
        return {
            "results": results,
            "gaps": {key: gap(results, key) for key in ("AP", *SIZES, *classes)},
            "elsewhere": self.elsewhere(),
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
        kept = [g for g in groups if any(found.get(g) is not None for found in values.values())]
        groups = {g: groups[g] for g in kept}
        if not groups:
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
            if run.detections is not None and self.comparable(run)
        }

    def settings(self) -> Dict[str, Any]:
        """Section 6: what makes the run again."""
        kept = {
            d.label: d.run
            for d in self.detectors
            if d.run is not None and d.run.lazy == self.run.lazy and not d.teaches
        }
        base, rows = differences(list(kept.values()))
        between = [row for row in rows if len(set(row[2:])) > 1]
        return {
            "records": {label: run.record for label, run in self.runs.items()},
            "labels": list(kept),
            "between": between,
            "shared": rows[len(between) :],
            "base": base,
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
        environment.filters["in_words"] = in_words
        return environment.get_template("page.html").render(
            run=self.run,
            what=self.what(),
            rows=self.head(),
            colour=self.colour,
            curves=self.curves(),
            scalars={
                label: {k: v for k, v in run.scalars.items() if not BOOKKEEPING.match(k)}
                for label, run in self.runs.items()
                if run.scalars
            },
            images=self.images(),
            maps=self.maps(),
            names=NAMES,
            similarity=self.similarity(),
            gains=self.gains(),
            settings=self.settings(),
            notes=self.notes,
            sample=len(self.samples),
            shown_score=pictures.SHOWN_SCORE,
            most_different=self.most_different if self.levels else None,
            gradient=gradient(),
            machine=machine(),
            threads=torch.get_num_threads(),
            timed=2 * min(TIMED, len(self.inputs)),
            made=in_words(now()),
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
            image = convert_image_to_rgb(x["image"].permute(1, 2, 0), self.shown)
            found["similarity.png"] = render(similarity_maps(self.model, x), image)
        paths = [os.path.join(folder, name) for name in found]
        for path, picture in zip(paths, found.values()):
            small = Image.fromarray(picture).quantize(256, Image.Quantize.FASTOCTREE)
            small.save(path, optimize=True)
        return paths


def adapters_in(weights: Mapping[str, torch.Tensor]) -> Set[Tuple[str, torch.Size]]:
    """Names and shapes of the distillers' adapters among a student's tensors by name."""
    return {(name, x.shape) for name, x in weights.items() if ADAPTER.match(name)}


def gap(results: Mapping[str, Mapping[str, Any]], key: str) -> Dict[str, Optional[float]]:
    """What a student gained on its twin, and the share in percent of its teacher's lead over that.

    None is what cannot be told: a run is missing, or the teacher does not lead.
    """
    student, vanilla, teacher = (
        results.get(label, {}).get(key) for label in ("student", "vanilla", "teacher")
    )
    if student is None or vanilla is None:
        return {"gain": None, "share": None}
    leads = teacher is not None and teacher > vanilla
    share = 100 * (student - vanilla) / (teacher - vanilla) if leads else None
    return {"gain": student - vanilla, "share": share}


def number(value: Optional[float], digits: int = 1) -> str:
    """A value as the page writes it; a dash where it is not known."""
    known = value is not None and not math.isnan(value)
    return f"{value:.{digits}f}" if known else "\N{EN DASH}"
