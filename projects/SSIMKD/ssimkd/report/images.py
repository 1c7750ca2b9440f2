"""Pictures of the report: ground truth, detections, and where student and teacher differ."""

import base64
import io
from typing import Any, Dict, List, Mapping

import numpy as np
from detectron2.data import Metadata
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.structures import Boxes, Instances
from PIL import Image

from ssimkd.evaluation.predictor import draw_detections
from ssimkd.evaluation.similarity import in_colour, render, similarity_maps

from .detectors import Detector

LEAST_SCORE = 0.3  # detections below it are not drawn
WIDTH = 640  # pixels of a picture of detections, at most
Picture = np.ndarray  # (H, W, 3) uint8, RGB
Maps = Mapping[str, Mapping[str, np.ndarray]]  # of ssimkd.evaluation.similarity


def truth(record: Mapping[str, Any], fields: List[str]) -> Instances:
    """The annotated objects of an image, without crowds, as a detector would give them.

    Args:
        record (mapping): Detectron2's record of the image.
        fields (list[str]): what a detector predicts, such as "pred_masks"; the rest is left out.
    """
    size = record["height"], record["width"]
    objects = [o for o in record.get("annotations", ()) if not o.get("iscrowd", 0)]
    if not objects:
        none = Boxes(np.zeros((0, 4)))
        return Instances(size, pred_boxes=none, pred_classes=np.zeros(0, int))
    given = annotations_to_instances(objects, size, mask_format="bitmask").get_fields()
    found = Instances(size)
    for name, value in given.items():
        name = name.replace("gt_", "pred_")
        if name in fields or name in ("pred_boxes", "pred_classes"):
            found.set(name, value if name == "pred_boxes" else getattr(value, "tensor", value))
    return found


def draw_image(
    record: Mapping[str, Any], detectors: List[Detector], metadata: Metadata
) -> Dict[str, Picture]:
    """One image as annotated and as each detector sees it: label -> picture."""
    name = record["file_name"]
    found = {d.label: d.detect(name) for d in detectors if d.model is not None}
    kept = {label: x[x.scores >= LEAST_SCORE] for label, x in found.items() if x is not None}
    fields = [name for x in kept.values() for name in x.get_fields()]
    shown = {"ground truth": truth(record, fields), **kept}
    return {label: draw_detections(name, x, metadata) for label, x in shown.items()}


def level_means(maps: Maps) -> Dict[str, float]:
    """Level -> mean SSIM over the image."""
    return {level: float(np.nanmean(by_name["SSIM"])) for level, by_name in maps.items()}


def difference(maps: Maps) -> np.ndarray:
    """1 - SSIM, the mean of the levels, (H, W); 0 where student and teacher agree."""
    return 1 - np.nanmean([by_name["SSIM"] for by_name in maps.values()], axis=0)


def draw_difference(detector: Detector, file_name: str) -> Picture:
    """The map of :func:`difference`: dark is 0, bright is 1 and more."""
    maps = similarity_maps(detector.model, detector.read(file_name))
    return in_colour(difference(maps), (0.0, 1.0))


def draw_maps(detector: Detector, file_name: str) -> Picture:
    """The similarity maps of all levels in one picture, with the image on the left."""
    maps = similarity_maps(detector.model, detector.read(file_name))
    return render(maps, read_image(file_name, "RGB"))


def data_url(picture: Picture, kind: str = "jpeg") -> str:
    """A picture as the address of an <img>. A JPEG is made WIDTH pixels wide at most."""
    image, out = Image.fromarray(picture), io.BytesIO()
    if kind == "jpeg":
        image.thumbnail((WIDTH, 10 * WIDTH))
    image.save(out, kind)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
