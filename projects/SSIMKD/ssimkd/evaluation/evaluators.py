"""The metrics of each kind of data set that Detectron2 knows, and `results.json`."""

import importlib.util
import json
import logging
import math
import os
from functools import partial
from typing import Any, Dict, Optional, Type

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
    coco_evaluation,
)
from detectron2.utils import comm
from omegaconf import ListConfig
from pycocotools import cocoeval

from ssimkd.errors import ConfigError
from ssimkd.utils.atomic import atomic_write
from ssimkd.utils.compat import has_compiled_ops
from ssimkd.utils.lazy_config import target_of

logger = logging.getLogger(__name__)


def build_evaluator(cfg, dataset_name: str) -> DatasetEvaluator:
    """The evaluator that the data set's metadata asks for, as in Detectron2's `train_net.py`.

    Args:
        cfg (CfgNode): OUTPUT_DIR/inference takes the detections.
        dataset_name (str): a registered data set.

    Raises:
        ConfigError: its kind is unknown.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    kinds = {
        "coco": [coco],
        "coco_panoptic_seg": [sem_seg, coco, panoptic],
        "sem_seg": [sem_seg],
        "lvis": [lambda cfg, name, folder: LVISEvaluator(name, output_dir=folder)],
        "pascal_voc": [lambda cfg, name, folder: PascalVOCDetectionEvaluator(name)],
        "cityscapes_instance": [lambda cfg, name, folder: CityscapesInstanceEvaluator(name)],
        "cityscapes_sem_seg": [lambda cfg, name, folder: CityscapesSemSegEvaluator(name)],
    }
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in kinds:
        known = ", ".join(kinds)
        raise ConfigError(
            f"DATASETS.TEST: {dataset_name} has the evaluator_type {kind!r}; known are {known}"
        )
    evaluators = [build(cfg, dataset_name, folder) for build in kinds[kind]]
    evaluators = [evaluator for evaluator in evaluators if evaluator is not None]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def build_lazy_evaluator(node, folder: str) -> DatasetEvaluator:
    """The evaluator of a LazyConfig's `dataloader.evaluator`, a node or a list of nodes.

    Args:
        node (DictConfig or ListConfig): COCOEvaluators may get defaults.
        folder (str): takes the detections.
    """
    evaluators = []
    for each in node if isinstance(node, ListConfig) else [node]:
        target = target_of(each)
        if target is COCOEvaluator:
            each.setdefault("use_fast_impl", has_compiled_ops())
            each._target_ = coco_class(each.use_fast_impl)
            each.setdefault("output_dir", folder)
        if target is not COCOPanopticEvaluator or has_panopticapi():
            evaluators.append(instantiate(each))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def coco(cfg, name: str, folder: str) -> DatasetEvaluator:
    """Boxes, masks and keypoints, by compiled code where Detectron2 or a package has it."""
    fast = has_compiled_ops()
    return coco_class(fast)(
        name,
        output_dir=folder,
        use_fast_impl=fast,
        kpt_oks_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
    )


def coco_class(fast: bool) -> Type[COCOEvaluator]:
    """COCOEvaluator, or where it is not `fast` by itself one that is, if its package is there."""
    found = importlib.util.find_spec("ultrafast_pycocotools")
    return COCOEvaluator if fast or found is None else FastCOCOEvaluator


class FastCOCOEvaluator(COCOEvaluator):
    """COCOEvaluator with the metric of ultrafast-pycocotools, which equals pycocotools' bit by bit.

    As many images as COCO's validation has take a second instead of 45 (docs/performance.md). An
    annotation of id 0 is one like any other here; pycocotools forgets what matched it.
    """

    def evaluate(self, *args, **kwargs):
        """See COCOEvaluator."""
        import ultrafast_pycocotools as fast

        slow, upstream = self._coco_api, coco_evaluation.COCOeval
        self._coco_api = fast.COCO(slow.dataset, verbose=False)
        # a quiet terminal has a `print` of its own there
        say = getattr(cocoeval, "print", print)
        coco_evaluation.COCOeval = partial(fast.COCOeval, print_function=say)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._coco_api, coco_evaluation.COCOeval = slow, upstream


def sem_seg(cfg, name: str, folder: str) -> DatasetEvaluator:
    """Semantic segmentation."""
    return SemSegEvaluator(name, distributed=True, output_dir=folder)


def panoptic(cfg, name: str, folder: str) -> Optional[DatasetEvaluator]:
    """Panoptic segmentation, where COCO's panopticapi is installed: no package index has it."""
    return COCOPanopticEvaluator(name, folder) if has_panopticapi() else None


def has_panopticapi() -> bool:
    """Whether COCO's panopticapi is installed; says so where it is not."""
    found = importlib.util.find_spec("panopticapi") is not None
    if not found:
        logger.warning("The panoptic quality is not measured: panopticapi is not installed")
    return found


def save_results(results: Dict[str, Any], folder: str) -> None:
    """Writes an evaluation's metrics to `results.json`, on the main process."""
    if comm.is_main_process() and results:
        with atomic_write(os.path.join(folder, "results.json"), "w") as f:
            json.dump(without_nan(results), f, indent=2)


def without_nan(value: Any) -> Any:
    """Nested metrics with None for NaN, which JSON does not know (no object of a size, say)."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
