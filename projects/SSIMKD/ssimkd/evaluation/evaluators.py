"""The metrics of each kind of data set that Detectron2 evaluates, and `results.json`."""

import importlib.util
import io
import json
import logging
import math
import os
from contextlib import redirect_stdout
from functools import partial
from typing import Any, Dict, List

from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils import comm
from omegaconf import ListConfig

from ssimkd.errors import ConfigError
from ssimkd.utils.atomic import atomic_write
from ssimkd.utils.compat import has_compiled_ops
from ssimkd.utils.config_keys import target_of

logger = logging.getLogger(__name__)


def build_evaluator(cfg, dataset_name: str) -> DatasetEvaluator:
    """The evaluator that the data set's metadata asks for, as in Detectron2's `train_net.py`.

    Args:
        cfg (CfgNode): detections are written to OUTPUT_DIR/inference.
        dataset_name (str): a registered data set.

    Raises:
        ConfigError: the data set's `evaluator_type` is unknown.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    sem_seg = partial(SemSegEvaluator, distributed=True, output_dir=folder)
    coco = partial(
        COCOEvaluator,
        output_dir=folder,
        use_fast_impl=has_compiled_ops(),
        kpt_oks_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
    )
    kinds: Dict[str, List[Any]] = {
        "coco": [coco],
        "coco_panoptic_seg": [sem_seg, coco],
        "sem_seg": [sem_seg],
        "lvis": [partial(LVISEvaluator, output_dir=folder)],
        "pascal_voc": [PascalVOCDetectionEvaluator],
        "cityscapes_instance": [CityscapesInstanceEvaluator],
        "cityscapes_sem_seg": [CityscapesSemSegEvaluator],
    }
    if kind not in kinds:
        raise ConfigError(
            f"DATASETS.TEST: {dataset_name} has the evaluator_type {kind!r}; known are "
            + ", ".join(kinds)
        )
    if kind == "coco_panoptic_seg" and has_panopticapi():
        kinds[kind].append(partial(COCOPanopticEvaluator, output_dir=folder))
    return prepared([build(dataset_name) for build in kinds[kind]])


def repair_annotations(evaluator: DatasetEvaluator) -> None:
    """Repairs annotations for COCO's metric.

    It counts labelled keypoints where the file does not. It renumbers annotations from 1 where an
    id is 0, for which the metric counts no detection, negative, or text, for which it fails.
    """
    coco = getattr(evaluator, "_coco_api", None)
    annotations = coco.dataset.get("annotations", []) if coco else []
    for entry in annotations:
        if "keypoints" in entry:
            visible = sum(value > 0 for value in entry["keypoints"][2::3])
            entry.setdefault("num_keypoints", visible)
    if coco and not all(isinstance(x["id"], int) and x["id"] > 0 for x in annotations):
        for number, entry in enumerate(annotations, start=1):
            entry["id"] = number
        with redirect_stdout(io.StringIO()):
            coco.createIndex()


def prepared(evaluators: List[DatasetEvaluator]) -> DatasetEvaluator:
    """Joins evaluators into one, with :func:`repair_annotations`."""
    for evaluator in evaluators:
        repair_annotations(evaluator)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def build_lazy_evaluator(node, folder: str) -> DatasetEvaluator:
    """The evaluator of a LazyConfig's `dataloader.evaluator`, a node or a list of nodes.

    Args:
        node (DictConfig or ListConfig): a COCOEvaluator without `use_fast_impl` or `output_dir`
            gets them.
        folder (str): where detections are written.
    """
    evaluators = []
    for each in node if isinstance(node, ListConfig) else [node]:
        target = target_of(each)
        if target is COCOEvaluator:
            each.setdefault("use_fast_impl", has_compiled_ops())
            each.setdefault("output_dir", folder)
        if target is not COCOPanopticEvaluator or has_panopticapi():
            evaluators.append(instantiate(each))
    return prepared(evaluators)


def has_panopticapi() -> bool:
    """Whether COCO's panopticapi is installed, which no package index has. Warns if it is not."""
    found = importlib.util.find_spec("panopticapi") is not None
    if not found:
        logger.warning("The panoptic quality is not measured: panopticapi is not installed")
    return found


def save_results(results: Dict[str, Any], folder: str) -> None:
    """Writes the metrics of an evaluation to `results.json` in the main process."""
    if comm.is_main_process() and results:
        with atomic_write(os.path.join(folder, "results.json"), "w") as f:
            json.dump(without_nan(results), f, indent=2)


def without_nan(value: Any) -> Any:
    """Nested metrics with None for NaN, which JSON lacks. The AP of no objects is NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
