"""Reads the files that a training or an evaluation left in its folder."""

import json
import os
import re
from functools import cached_property
from typing import Any, Dict, List, Optional, Tuple

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from ssimkd.checkpoint.coverage import load_detector_weights
from ssimkd.checkpoint.reader import fetch
from ssimkd.data.datasets import use_own_data
from ssimkd.engine.run_record import end_of, import_recorded, read_record
from ssimkd.errors import ConfigError, as_config_error
from ssimkd.evaluation.predictor import device_of
from ssimkd.utils.config_files import load_config
from ssimkd.utils.config_keys import names_of, setting, unlabeled_batch, without_pretraining

Series = Tuple[List[int], List[float]]  # iterations and values


class Run:
    """The folder of a run. Each file is read when it is asked for.

    Args:
        folder (str): OUTPUT_DIR or train.output_dir of the run.

    Attributes:
        cfg (CfgNode or DictConfig): its config.yaml.
        record (list[dict]): the entries of its run.json, oldest first.
        notes (list[str]): a sentence for the page about each file that is broken.
        failed (bool): whether its data could not be registered.

    Raises:
        ConfigError: there is no config.yaml, or it cannot be read.
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.normpath(folder)
        self.notes: List[str] = []
        import_recorded(self.folder)
        path = self.path("config.yaml")
        if not os.path.isfile(path):
            raise ConfigError(f"{folder} holds no config.yaml. Is it the folder of a run?")
        with open(path) as f:
            lazy = not re.search(r"^MODEL:", f.read(), re.MULTILINE)
        if lazy:
            with as_config_error(path, Exception):
                self.cfg = LazyConfig.load(path)
        else:
            self.cfg = load_config(path)
        self.failed = False
        try:
            use_own_data(self.cfg, ("TEST",))
        except ConfigError as error:  # the data was moved: the page does without its images
            self.notes.append(f"{error}.")
            self.failed = True
        self.record = read_record(self.folder)

    def path(self, *parts: str) -> str:
        """The path of a file of the folder."""
        return os.path.join(self.folder, *parts)

    @property
    def lazy(self) -> bool:
        """Whether the config is a LazyConfig."""
        return not isinstance(self.cfg, CfgNode)

    @property
    def dataset(self) -> str:
        """The last data set that the run evaluates on, or "" if there is none."""
        return ["", *names_of(self.cfg, "TEST")][-1]

    @property
    def other_data(self) -> bool:
        """Whether the name of its data is that of other data, which another run registered."""
        return self.failed and self.dataset in DatasetCatalog

    @cached_property
    def results(self) -> Dict[str, Dict[str, Optional[float]]]:
        """Task -> metric -> percent of the last evaluation; empty if there was none.

        Detectron2 groups the results by data sets where there are several.
        """
        found = self._json("results.json") or {}
        found = found.get(self.dataset, found)
        several = any(isinstance(value, dict) for task in found.values() for value in task.values())
        if found and (several or not self._evaluated):
            self.notes.append(
                "results.json is of other data sets than config.yaml and is left out."
            )
            return {}
        if found and self.training and self._last_finished.get("evaluates"):
            command = self._last_finished["command"]
            self.notes.append(f"AP and errors of {self.folder} are those that {command} found.")
        return found

    @property
    def _last_finished(self) -> Dict[str, Any]:
        """The entry of run.json that was the last to finish; {} if none has."""
        finished = [entry for entry in self.record if entry.get("outcome") == "finished"]
        return [{}, *sorted(finished, key=lambda entry: entry.get("ended") or "")][-1]

    @property
    def _evaluated(self) -> bool:
        """Whether the last evaluation in this folder was of the data sets of config.yaml."""
        names = names_of(self.cfg, "TEST")
        return self._last_finished.get("test", names) == names

    @cached_property
    def scalars(self) -> Dict[str, Series]:
        """The scalars of metrics.json by name.

        A line with losses of an iteration that the file has already begins a part that was trained
        again, or a new run: what the file had from that iteration on is left out. Other scalars
        may have lines of earlier iterations. A line that a killed run did not finish is skipped.
        """
        by_name: Dict[str, Dict[int, float]] = {}
        path = self.path("metrics.json")
        if not os.path.isfile(path):
            return {}
        with open(path) as f:
            for number, line in enumerate(f, start=1):
                try:
                    values = json.loads(line)
                except json.JSONDecodeError:
                    self.notes.append(f"Line {number} of {path} is not JSON and was skipped.")
                    continue
                now, losses = values.pop("iteration"), by_name.get("total_loss", {})
                again = "total_loss" in values and now <= max(losses, default=-1)
                for name in by_name if again else values:
                    points = by_name.setdefault(name, {})
                    for iteration in [x for x in points if x >= now]:
                        del points[iteration]
                for name, value in values.items():
                    by_name.setdefault(name, {})[now] = value
        return {
            name: (sorted(points), [points[i] for i in sorted(points)])
            for name, points in by_name.items()
            if points
        }

    @cached_property
    def detections(self) -> Optional[List[Dict[str, Any]]]:
        """The detections of the last evaluation in COCO's format; None if there are none."""
        return self._json("inference", "coco_instances_results.json") if self._evaluated else None

    @cached_property
    def images(self) -> List[Dict[str, Any]]:
        """Detectron2's records of the images that the run evaluates on; empty if they are gone."""
        if not self.dataset or self.other_data:
            return []
        try:
            return DatasetCatalog.get(self.dataset)
        except KeyError:
            self.notes.append(f"The data set {self.dataset} is not registered.")
        except OSError as error:
            self.notes.append(f"The data set {self.dataset} cannot be read: {error}")
        return []

    @cached_property
    def objects(self) -> Optional[List[Dict[str, Any]]]:
        """The annotations of these images in COCO's format; None if there are none."""
        own = self.path("inference", f"{self.dataset}_coco_format.json")
        path = MetadataCatalog.get(self.dataset).get("json_file", own) if self.images else ""
        if not os.path.isfile(path):
            return None
        with open(path) as f:
            return json.load(f).get("annotations")

    @property
    def weights(self) -> str:
        """The last checkpoint, else the exported student, else the weights that were evaluated.

        It is "" for a training that left neither. Its config names the weights that it started
        from, and those are not the trained ones.
        """
        last = self.path("last_checkpoint")
        if os.path.isfile(last):
            with open(last) as f:
                return self.path(os.path.basename(f.read().strip()))
        if os.path.isfile(self.path("student.pth")):
            return self.path("student.pth")
        return "" if self.has_trained else setting(self.cfg, "weights")

    @property
    def training(self) -> List[Dict[str, Any]]:
        """The entries of run.json that are trainings, oldest first."""

        def evaluates(entry: Dict[str, Any]) -> bool:  # an early version has no such key
            return entry.get("evaluates", "--eval-only" in entry["command"])

        return [entry for entry in self.record if not evaluates(entry)]

    @property
    def has_trained(self) -> bool:
        """Whether the run was a training, also one of Detectron2's own, which has no run.json."""
        return bool(self.training) or os.path.isfile(self.path("metrics.json"))

    @property
    def trained(self) -> str:
        """Describes the training: data sets, iterations and batch size."""
        if self.record and not self.training:
            return "nothing: the run was only evaluated"
        words, images = ", ".join(names_of(self.cfg, "TRAIN")), str(setting(self.cfg, "batch"))
        unlabeled = unlabeled_batch(self.cfg)
        if unlabeled and any("_kd_loss" in name for name in self.scalars):
            words += f", and without labels {', '.join(names_of(self.cfg, 'UNLABELED'))}"
            images += f" + {unlabeled}"
        iterations = self.scalars.get("total_loss", ([], []))[0]
        if iterations:
            words += f", {iterations[-1] + 1} iterations of {images} images"
        return words

    @property
    def ended(self) -> str:
        """How the training ended, or when the evaluation ended if nothing was trained."""
        entries = self.training or self.record
        return end_of(entries[-1]) if entries else "not known, without a run.json"

    def build(self) -> nn.Module:
        """The detector with its weights, in evaluation mode. Its teacher is not built.

        It is on the run's device, or on the CPU if this machine has no GPU.

        Raises:
            ConfigError: the model cannot be built, or no checkpoint holds all of it.
        """
        device = str(device_of(self.cfg))
        with as_config_error("its model cannot be built", Exception):
            cfg = without_pretraining(self.cfg)
            if self.lazy:
                model = instantiate(cfg.model).to(device)
            else:
                cfg.MODEL.DEVICE = device
                model = build_model(cfg)
        if not self.weights:
            raise ConfigError("there is no checkpoint")
        path = fetch(self.weights)
        absent = load_detector_weights(model, path, "its checkpoint")
        if absent:
            raise ConfigError(f"{path} does not hold {absent[0]} as its config describes it")
        return model.eval()

    def _json(self, *parts: str) -> Any:
        path = self.path(*parts)
        if not os.path.isfile(path):
            return None
        with open(path) as f:
            try:
                return json.load(f)
            except ValueError as error:  # such as after an interruption while it was written
                self.notes.append(f"{path} is not valid JSON: {error}. Its content is left out.")
                return None
