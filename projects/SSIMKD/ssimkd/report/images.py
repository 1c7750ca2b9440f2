"""Pictures of the report: the truth, what each detector finds, and maps of student and teacher."""

import base64
import io
from typing import Any, List, Mapping, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from PIL import Image

from ssimkd.evaluation.similarity import render, similarity_maps

from .detection_errors import FOREGROUND
from .detectors import Detector

LEAST_SCORE = 0.3  # detections below it are not drawn
LABELLED = 8  # boxes; in a picture with more of them the names would hide objects
WIDTH = 480  # pixels of a picture
HIT, MISS, FALSE_ALARM = "#22d3ee", "#f59e0b", "#ec4899"  # their colours
CLASSES = ("#3b82f6", "#84cc16", "#8b5cf6", "#ef4444", "#e2e8f0", "#0f766e")  # in turn
BLACK = (0, 0, 0)
Picture = np.ndarray  # (H, W, 3) uint8, RGB


def truth(record: Mapping[str, Any]) -> Instances:
    """The annotated objects of an image, without crowds, in Detectron2's form of annotations."""
    objects = [o for o in record.get("annotations", ()) if not o.get("iscrowd", 0)]
    boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
    found = Instances((record["height"], record["width"]))
    found.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.gt_classes = torch.tensor([o["category_id"] for o in objects], dtype=torch.long)
    return found


def hits_and_misses(objects: Instances, found: Instances) -> Tuple[List[bool], List[bool]]:
    """Whether each detection is a hit, and whether each object is missed.

    In the order of their scores detections take the object of their class that they overlap most,
    by FOREGROUND at least. An object is taken once.
    """
    iou = pairwise_iou(found.pred_boxes, objects.gt_boxes)
    iou[found.pred_classes[:, None] != objects.gt_classes[None]] = 0
    hits, missed = [False] * len(found), [True] * len(objects)
    for i in found.scores.argsort(descending=True).tolist():
        free = iou[i] * torch.tensor(missed)
        if len(objects) and free.max() >= FOREGROUND:
            hits[i], missed[int(free.argmax())] = True, False
    return hits, missed


def draw(record: Mapping[str, Any], found: Optional[Instances], names: Sequence[str]) -> Picture:
    """The truth in the colours of the classes, or hits, misses and false alarms of a detector.

    Args:
        record (mapping): Detectron2's record of the image.
        found (Instances or None): detections in its pixels; None draws the truth.
        names (sequence[str]): of the classes.
    """
    image, objects = read_image(record["file_name"], "RGB"), truth(record)
    scale = WIDTH / image.shape[1]
    image = np.ascontiguousarray(
        cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    )
    name = dict(enumerate(names)).get
    items = []  # box, colour, text
    if found is None:
        for box, label in zip(objects.gt_boxes, objects.gt_classes.tolist()):
            items.append((box, class_colour(label), name(label, str(label))))
    else:
        hits, missed = hits_and_misses(objects, found)
        classes, scores = found.pred_classes.tolist(), found.scores.tolist()
        for box, label, score, hit in zip(found.pred_boxes, classes, scores, hits):
            items.append((box, HIT if hit else FALSE_ALARM, f"{name(label, label)} {score:.2f}"))
        for index in np.flatnonzero(missed):
            label = int(objects.gt_classes[index])
            items.append((objects.gt_boxes.tensor[index], MISS, name(label, str(label))))
    for box, colour, text in items:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        x0, y0, x1, y1 = (round(value) for value in (box * scale).tolist())
        cv2.rectangle(image, (x0, y0), (x1, y1), rgb, 2)
        for ink, width in ((BLACK, 2), (rgb, 1)) if len(items) <= LABELLED else ():
            place = max(x0, 0), max(y0 - 3, 11)
            cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, ink, width, cv2.LINE_AA)
    return image


def class_colour(label: int) -> str:
    """The colour of a class in pictures of the truth."""
    return CLASSES[label % len(CLASSES)]


def draw_maps(detector: Detector, file_name: str) -> Picture:
    """The similarity maps of all levels in one picture, with the image on the left."""
    maps = similarity_maps(detector.model, detector.read(file_name))
    return render(maps, read_image(file_name, "RGB"))


def data_url(picture: Picture) -> str:
    """A picture as the address of an <img>."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "jpeg")
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
