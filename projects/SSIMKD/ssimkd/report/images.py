"""Pictures of the report: ground truth, detections, and maps of student and teacher."""

import base64
import io
from typing import Any, Dict, List, Mapping

import numpy as np
from detectron2.data import Metadata
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.structures import Instances
from PIL import Image

from ssimkd.evaluation.predictor import draw_detections
from ssimkd.evaluation.similarity import render, similarity_maps

from .detectors import Detector

LEAST_SCORE = 0.3  # detections below it are not drawn
WIDTH = 420  # pixels of a picture of detections
Picture = np.ndarray  # (H, W, 3) uint8, RGB


def truth(record: Mapping[str, Any], masks: bool) -> Instances:
    """The annotated objects of an image in the form of detections, without crowds.

    Args:
        record (mapping): Detectron2's record of the image.
        masks (bool): whether to include the masks of the objects.
    """
    size = record["height"], record["width"]
    keys = ("bbox", "bbox_mode", "category_id", *(["segmentation"] if masks else []))
    objects = [
        {key: o[key] for key in keys if key in o}
        for o in record.get("annotations", ())
        if not o.get("iscrowd", 0)
    ]
    given = annotations_to_instances(objects, size, mask_format="bitmask")
    found = Instances(size, pred_boxes=given.gt_boxes, pred_classes=given.gt_classes)
    if given.has("gt_masks"):
        found.pred_masks = given.gt_masks.tensor
    return found


def draw_image(
    record: Mapping[str, Any], detectors: List[Detector], metadata: Metadata
) -> Dict[str, Picture]:
    """One image as annotated and as each detector sees it: label -> picture."""
    name = record["file_name"]
    found = {d.label: d.detect(name) for d in detectors if d.model is not None}
    kept = {label: x[x.scores >= LEAST_SCORE] for label, x in found.items() if x is not None}
    masks = any(x.has("pred_masks") for x in kept.values())
    shown = {"ground truth": truth(record, masks), **kept}
    return {label: draw_detections(name, x, metadata, WIDTH) for label, x in shown.items()}


def draw_maps(detector: Detector, file_name: str) -> Picture:
    """The similarity maps of all levels in one picture, with the image on the left."""
    maps = similarity_maps(detector.model, detector.read(file_name))
    return render(maps, read_image(file_name, "RGB"))


def data_url(picture: Picture) -> str:
    """A picture as the address of an <img>."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "jpeg")
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
