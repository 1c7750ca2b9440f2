"""Reading a run's folder, YAML or lazy."""

import json
import os
import re
import shlex
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from ssimkd.checkpoint.reader import fetch
from ssimkd.checkpoint.strict import load_teacher
from ssimkd.data.datasets import use_own_data
from ssimkd.engine.arguments import load_config
from ssimkd.engine.run_record import in_words, read_json, read_record
from ssimkd.errors import ConfigError, as_config_error
from ssimkd.evaluation.predictor import device_of
from ssimkd.utils.config_keys import names_of, setting

Series = Tuple[List[int], List[float]]  # iterations and values


class Run:
    """What `train_net.py` left in a folder; everything is read when it is asked for.

    Args:
        folder (str): OUTPUT_DIR or train.output_dir of the run.

    Raises:
        ConfigError: there is no config, or it cannot be read.
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.normpath(folder)
        self.name = os.path.basename(self.folder)
        path = self.path("config.yaml")
        if not os.path.isfile(path):
            raise ConfigError(f"{folder}: there is no config.yaml: is it the folder of a run?")
        with as_config_error(path, Exception):
            with open(path) as f:
                lazy = not re.search(r"^MODEL:", f.read(), re.MULTILINE)
            if lazy:
                self.cfg = LazyConfig.load(path)
                use_own_data(self.cfg, ("TEST",))
            else:
                self.cfg = load_config(path, [], ("TEST",))
        self.record = read_record(self.folder)

    def path(self, *parts: str) -> str:
        """A file of the folder."""
        return os.path.join(self.folder, *parts)

    @property
    def lazy(self) -> bool:
        """Whether the config is a LazyConfig."""
        return not isinstance(self.cfg, CfgNode)

    @property
    def dataset(self) -> str:
        """The data set that the run evaluates on, the last one of several; "" where none."""
        names = names_of(self.cfg, "TEST")
        return names[-1] if names else ""

    @cached_property
    def results(self) -> Dict[str, Dict[str, Optional[float]]]:
        """The last evaluation, task -> metric -> percent; empty where there was none."""
        found = self._json("results.json") or {}
        return found.get(self.dataset, found)

    @cached_property
    def scalars(self) -> Dict[str, Series]:
        """Every scalar of metrics.json; where a resume repeats an iteration, the later value."""
        by_name: Dict[str, Dict[int, float]] = {}
        path = self.path("metrics.json")
        lines = Path(path).read_text().splitlines() if os.path.isfile(path) else []
        for number, line in enumerate(lines):
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                if number == len(lines) - 1:  # the run was killed while it wrote
                    break
                raise ConfigError(f"{path}: line {number + 1} is no JSON") from None
            for name, value in values.items():
                by_name.setdefault(name, {})[values["iteration"]] = value
        return {
            name: (sorted(points), [points[i] for i in sorted(points)])
            for name, points in by_name.items()
        }

    @cached_property
    def detections(self) -> Optional[List[Dict[str, Any]]]:
        """COCO's results of the last evaluation; None where there are none."""
        return self._json("inference", "coco_instances_results.json")

    @cached_property
    def objects(self) -> Optional[List[Dict[str, Any]]]:
        """COCO's annotations of the data set; None where it has no json."""
        DatasetCatalog.get(self.dataset)  # draws the embedded data
        own = self.path("inference", f"{self.dataset}_coco_format.json")
        path = MetadataCatalog.get(self.dataset).get("json_file", own)
        if not os.path.isfile(path):
            return None
        with open(path) as f:
            return json.load(f)["annotations"]

    @property
    def weights(self) -> str:
        """The checkpoint to look at: the last one, the exported student, or what was evaluated.

        "" where a training left none: what it started from is not what it trained. metrics.json
        tells of one, too.
        """
        last = self.path("last_checkpoint")
        if os.path.isfile(last):
            with open(last) as f:
                return self.path(os.path.basename(f.read().strip()))
        if os.path.isfile(self.student):
            return self.student
        trained = self.training or os.path.isfile(self.path("metrics.json"))
        return "" if trained else setting(self.cfg, "weights")

    @property
    def student(self) -> str:
        """The exported student, whether it is there or not."""
        return self.path("student.pth")

    @property
    def training(self) -> List[Dict[str, Any]]:
        """The entries of run.json that trained, oldest first."""
        return [e for e in self.record if "--eval-only" not in shlex.split(e["command"])]

    @property
    def only_evaluated(self) -> bool:
        """Whether nothing was trained in the folder, as far as run.json tells."""
        return bool(self.record) and not self.training

    @property
    def ended(self) -> str:
        """When the last training of the run ended, in words."""
        if not self.record:
            return "not known: there is no run.json"
        if not self.training:
            return f"only evaluated, {in_words(self.record[-1]['ended'])}"
        return in_words(self.training[-1]["ended"])

    @property
    def seen(self) -> str:
        """Iterations times images of each, in words; the former as far as it was logged."""
        batch = setting(self.cfg, "batch")
        iterations = self.scalars.get("total_loss", ([], []))[0]
        return f"{iterations[-1] + 1} x {batch} images" if iterations else "not known"

    @property
    def trained_on(self) -> str:
        """Names of the data sets of the training; "nothing" where it has none."""
        return ", ".join(names_of(self.cfg, "TRAIN")) or "nothing"

    @property
    def training_time(self) -> str:
        """Minutes of all commands that trained, with their evaluations, in words."""
        if not self.training or not all(e["ended"] for e in self.training):
            return "not known"
        spans = [
            [datetime.fromisoformat(e[k]) for k in ("started", "ended")] for e in self.training
        ]
        return (
            f"{sum((b - a).total_seconds() for a, b in spans) / 60:.1f} min, evaluations included"
        )

    @property
    def device(self) -> str:
        """The run's device where this machine has it, else the CPU."""
        return str(device_of(self.cfg))

    def build(self) -> nn.Module:
        """The detector with its weights, in evaluation mode, its distiller without teacher.

        Raises:
            ConfigError: there is no checkpoint, it does not hold all of the detector, or a class
                that the config names is not to be found, as one that its own file defines.
        """
        with as_config_error(
            "its model cannot be built", Exception
        ):  # a class of the user's may raise any
            if self.lazy:
                model = instantiate(self.cfg.model).to(self.device)
            else:
                cfg = self.cfg.clone()
                cfg.defrost()
                cfg.MODEL.DEVICE = self.device
                model = build_model(cfg)
        if not self.weights:
            raise ConfigError("there is no checkpoint")
        path = fetch(self.weights)
        absent = load_teacher(model, path, "its checkpoint")  # as strict as it is with teachers
        if absent:
            raise ConfigError(f"{path} does not hold {absent[0]} as its config has it")
        return model.eval()

    def samples(self, count: int) -> List[Tuple[Dict[str, Any], Dict[str, Any]]]:
        """Images of the data set at equal distances.

        Returns:
            list[(dict, dict)]: the data set's record, with its annotations, and what a model takes.
        """
        records = DatasetCatalog.get(self.dataset) if self.dataset else []
        chosen = records[:: max(1, len(records) // count)][:count]
        mapper: Any
        with as_config_error(f"{self.folder}: its mapper cannot be built", Exception):
            if self.lazy:
                mapper = instantiate(self.cfg.dataloader.test.mapper)
            else:
                mapper = DatasetMapper(self.cfg, is_train=False)
        return [(record, mapper(record)) for record in chosen]

    def _json(self, *parts: str) -> Any:
        path = self.path(*parts)
        return read_json(path) if os.path.isfile(path) else None
