"""The kinds of errors in a detector's boxes, and the cost of each kind in AP.

The definitions are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object
Detection Errors", ECCV 2020, arXiv 2008.08115, section 2). A detection that matches no object has
the kind of the first of these rows that applies:

    localisation     right class, and an overlap of BACKGROUND to FOREGROUND with an object
    classification   wrong class, and an overlap of FOREGROUND or more with an object
    duplicate        right class, but a detection with a higher score has matched the object
    background       no overlap above BACKGROUND with any object
    both             wrong class and wrong place

An object is "missed" if no detection matches it, and none would if its class or its place were
corrected. Overlap is the intersection over union of boxes. Detections in a crowd region are not
errors.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np
from pycocotools import mask

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1
Record = Mapping[str, Any]  # in COCO's format: "image_id", "category_id", "bbox" (x, y, w, h), ...


@dataclass
class DetectionErrors:
    """Errors of one detector on one data set.

    Attributes:
        ap50 (float): AP at overlap FOREGROUND in percent, as COCO computes it.
        counts (dict[str, int]): the number of errors of each of KINDS.
        costs (dict[str, float]): the rise of AP in percent if only this kind were corrected. Of the
            classification or localisation errors at one object, the one with the highest score
            then matches it. Every other error of the kind is removed. A class of which neither
            objects nor detections are left does not count.
    """

    ap50: float
    counts: Dict[str, int]
    costs: Dict[str, float]


@dataclass
class _Matches:
    """Lists with one entry for each detection, or for each object, of all images."""

    scores: List[float] = field(default_factory=list)
    classes: List[int] = field(default_factory=list)
    kinds: List[str] = field(default_factory=list)  # "" for a right detection
    corrected: List[int] = field(default_factory=list)  # class after correction; 0: removed
    objects: List[int] = field(default_factory=list)  # classes of the objects
    missed: List[bool] = field(default_factory=list)  # whether each object is missed


def detection_errors(objects: Sequence[Record], detections: Sequence[Record]) -> DetectionErrors:
    """Finds the errors in the detections of a data set.

    Args:
        objects (sequence[mapping]): COCO's annotations. No category id is 0.
        detections (sequence[mapping]): COCO's results, which have a "score".
    """
    by_image: Dict[int, Tuple[List[Record], List[Record]]] = defaultdict(lambda: ([], []))
    for place, records in enumerate((objects, detections)):
        for record in records:
            by_image[record["image_id"]][place].append(record)
    found = _Matches()
    for image in sorted(by_image):
        _match(*by_image[image], found)
    scores, classes, corrected, present = (
        np.array(x, float) for x in (found.scores, found.classes, found.corrected, found.objects)
    )
    kinds, missed = np.array(found.kinds, str), np.array(found.missed, bool)
    categories = np.unique(present)
    ap50 = _mean_ap(scores, classes, kinds == "", present, categories)
    counts, costs = {}, {}
    for kind in KINDS:
        wrong = kinds == kind
        counts[kind] = int(missed.sum() if kind == "missed" else wrong.sum())
        kept = ~wrong | (corrected >= 0)
        left = present[~missed] if kind == "missed" else present
        ap = _mean_ap(
            scores[kept],
            np.where(wrong, corrected, classes)[kept],
            ((kinds == "") | wrong)[kept],
            left,
            np.intersect1d(categories, [*left, *classes]),
        )
        costs[kind] = max(ap - ap50, 0.0)
    return DetectionErrors(ap50, counts, costs)


def _match(objects: List[Record], detections: List[Record], found: _Matches) -> None:
    """Adds one image to `found`."""
    detections = sorted(detections, key=lambda d: -d["score"])
    crowds = [o for o in objects if o.get("iscrowd", 0)]
    objects = [o for o in objects if not o.get("iscrowd", 0)]
    overlap, in_crowd = _overlaps(detections, objects, 0), _overlaps(detections, crowds, 1)
    object_class, crowd_class = (
        np.array([o["category_id"] for o in some], dtype=int) for some in (objects, crowds)
    )
    matched = np.zeros(len(objects), bool)
    candidate = np.full(len(objects), -1)  # the detection that matches the object once corrected
    for detection, row, crowd in zip(detections, overlap, in_crowd):
        own = detection["category_id"]
        same = row * (object_class == own)
        free = same * ~matched
        kind, target = "", -1
        if free.max(initial=0) >= FOREGROUND:
            matched[free.argmax()] = True
        elif (crowd * (crowd_class == own)).max(initial=0) >= FOREGROUND:
            continue
        else:
            kind, target = _kind(same, row * (object_class != own))
        if target >= 0 and candidate[target] < 0:
            candidate[target] = len(found.scores)
        found.scores.append(detection["score"])
        found.classes.append(own)
        found.kinds.append(kind)
        found.corrected.append(-1)
    for target, index in enumerate(candidate):
        if index >= 0 and not matched[target]:
            found.corrected[index] = int(object_class[target])
    found.objects += object_class.tolist()
    found.missed += (~matched & (candidate < 0)).tolist()


def _overlaps(detections: List[Record], objects: List[Record], crowd: int) -> np.ndarray:
    """(D, O) overlap of boxes. For crowds it is the share of the detection inside the crowd."""
    if not (detections and objects):
        return np.zeros((len(detections), len(objects)))
    boxes = [np.array([r["bbox"] for r in records], float) for records in (detections, objects)]
    return mask.iou(*boxes, [crowd] * len(objects))


def _kind(same: np.ndarray, other: np.ndarray) -> Tuple[str, int]:
    """The kind of error of a detection that matches no object.

    Args:
        same (np.ndarray): (O,) its overlap with each object of its class; 0 for other objects.
        other (np.ndarray): (O,) its overlap with each object of another class; 0 for the rest.

    Returns:
        (str, int): one of KINDS; the object that it would match once corrected, or -1.
    """
    best_same, best_other = same.max(initial=0), other.max(initial=0)
    if BACKGROUND <= best_same < FOREGROUND:
        return "localisation", int(same.argmax())
    if best_other >= FOREGROUND:
        return "classification", int(other.argmax())
    if best_same >= FOREGROUND:
        return "duplicate", -1
    return ("background" if best_other <= BACKGROUND else "both"), -1


def _mean_ap(
    scores: np.ndarray,
    classes: np.ndarray,
    right: np.ndarray,
    objects: np.ndarray,
    categories: np.ndarray,
) -> float:
    """COCO's AP in percent at one overlap, the mean over `categories`.

    Args:
        scores, classes, right (np.ndarray): (D,) one entry for each detection.
        objects (np.ndarray): (O,) class of each object.
        categories (np.ndarray): the classes; one without objects has an AP of 0.
    """
    aps = [
        _average_precision(scores[classes == c], right[classes == c], int((objects == c).sum()))
        for c in categories
    ]
    return 100 * float(np.mean(aps)) if aps else 0.0


def _average_precision(scores: np.ndarray, right: np.ndarray, objects: int) -> float:
    """Mean over the recalls 0, 0.01, ... 1 of the best precision at that recall or above."""
    if not objects:
        return 0.0
    hits = np.cumsum(right[np.argsort(-scores, kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / objects, np.linspace(0, 1, 101))
    return float(np.append(best, 0.0)[places].mean())
