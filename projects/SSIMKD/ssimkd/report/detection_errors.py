"""Why a detector's boxes are wrong, and what each kind of error costs in AP.

The definitions are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object
Detection Errors", ECCV 2020, arXiv 2008.08115, section 2). A detection that takes no object is

    localisation     right class, overlap with an object between BACKGROUND and FOREGROUND
    classification   overlap of FOREGROUND or more with an object of another class
    duplicate        the same with an object of its class that a better scored detection has taken
    background       no object overlaps it by more than BACKGROUND
    both             anything else: the wrong class, and badly placed

tried in this order, and an object is

    missed           no detection takes it, nor would once its class or place were right

Overlap is the intersection over union of boxes. Detections in a crowd region are no errors.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np
from pycocotools import mask

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1
Record = Mapping[str, Any]  # of COCO's json: "image_id", "category_id", "bbox" (x, y, w, h), ...


@dataclass
class DetectionErrors:
    """Errors of one detector on one data set.

    Attributes:
        ap50 (float): AP at overlap FOREGROUND in percent, as COCO computes it.
        counts (dict[str, int]): number of errors of each of KINDS.
        costs (dict[str, float]): by how much AP would rise, in percent, if this kind alone were
            mended: an object gets its best scored candidate (classification, localisation),
            detections vanish (both, duplicate, background), objects do (missed). >= 0.
    """

    ap50: float
    counts: Dict[str, int]
    costs: Dict[str, float]


@dataclass
class Judged:
    """Detections of all images, one entry of each list per detection, and objects likewise."""

    scores: List[float] = field(default_factory=list)
    classes: List[int] = field(default_factory=list)
    kinds: List[str] = field(default_factory=list)  # "" of a right one
    mended: List[int] = field(default_factory=list)  # class once it is mended; 0: it vanishes
    objects: List[int] = field(default_factory=list)  # class of each object
    missed: List[bool] = field(default_factory=list)  # of each object


def detection_errors(objects: Sequence[Record], detections: Sequence[Record]) -> DetectionErrors:
    """Judges the detections of a data set.

    Args:
        objects (sequence[mapping]): "annotations" of COCO's json.
        detections (sequence[mapping]): COCO's results, with "score"; category ids are not 0.
    """
    by_image: Dict[int, Tuple[List[Record], List[Record]]] = defaultdict(lambda: ([], []))
    for place, records in enumerate((objects, detections)):
        for record in records:
            by_image[record["image_id"]][place].append(record)
    judged = Judged()
    for image in sorted(by_image):
        judge(*by_image[image], judged)
    scores, classes, mended = (
        np.array(x, float) for x in (judged.scores, judged.classes, judged.mended)
    )
    kinds, missed = np.array(judged.kinds, str), np.array(judged.missed, bool)
    present = np.array(judged.objects, float)
    ap50 = mean_ap(scores, classes, kinds == "", present, present)
    counts, costs = {}, {}
    for kind in KINDS:
        wrong = kinds == kind
        counts[kind] = int(missed.sum() if kind == "missed" else wrong.sum())
        kept = ~wrong | (mended > 0)
        ap = mean_ap(
            scores[kept],
            np.where(wrong, mended, classes)[kept],
            ((kinds == "") | wrong)[kept],
            present[~missed] if kind == "missed" else present,
            present,
        )
        costs[kind] = max(ap - ap50, 0.0)
    return DetectionErrors(ap50, counts, costs)


def judge(objects: List[Record], detections: List[Record], judged: Judged) -> None:
    """Adds one image to `judged`."""
    detections = sorted(detections, key=lambda d: -d["score"])
    crowds = [o for o in objects if o.get("iscrowd", 0)]
    objects = [o for o in objects if not o.get("iscrowd", 0)]
    overlap, in_crowd = overlaps(detections, objects, False), overlaps(detections, crowds, True)
    object_class = np.array([o["category_id"] for o in objects], dtype=int)
    owner = np.full(len(objects), -1)  # detection that takes the object
    candidate = np.full(len(objects), -1)  # best scored detection that could, once mended
    first = len(judged.scores)
    for detection, row, crowd in zip(detections, overlap, in_crowd):
        own = detection["category_id"]
        same = row * (object_class == own)
        free = same * (owner < 0)
        kind, target = "", -1
        if free.max(initial=0) >= FOREGROUND:
            owner[free.argmax()] = len(judged.scores)
        elif any(crowd[k] >= FOREGROUND for k, c in enumerate(crowds) if c["category_id"] == own):
            continue
        else:
            kind, target = why_wrong(same, row * (object_class != own))
        if target >= 0 and candidate[target] < 0:
            candidate[target] = len(judged.scores)
        judged.scores.append(detection["score"])
        judged.classes.append(own)
        judged.kinds.append(kind)
        judged.mended.append(0)
    for target, index in enumerate(candidate):
        if index >= first and owner[target] < 0:
            judged.mended[index] = int(object_class[target])
    judged.objects += object_class.tolist()
    judged.missed += ((owner < 0) & (candidate < 0)).tolist()


def overlaps(detections: List[Record], objects: List[Record], crowd: bool) -> np.ndarray:
    """(D, O) overlap of boxes; with a crowd, the share of the detection that lies in it."""
    if not (detections and objects):
        return np.zeros((len(detections), len(objects)))
    boxes = [np.array([r["bbox"] for r in records], float) for records in (detections, objects)]
    return mask.iou(*boxes, [int(crowd)] * len(objects))


def why_wrong(same: np.ndarray, other: np.ndarray) -> Tuple[str, int]:
    """The kind of a detection that takes no object.

    Args:
        same, other (np.ndarray): (O,) its overlap with each object of its class, and with those of
            other classes; 0 for the rest.

    Returns:
        (str, int): one of KINDS; the object that it would take once mended, or -1.
    """
    best_same, best_other = same.max(initial=0), other.max(initial=0)
    if BACKGROUND <= best_same < FOREGROUND:
        return "localisation", int(same.argmax())
    if best_other >= FOREGROUND:
        return "classification", int(other.argmax())
    if best_same >= FOREGROUND:
        return "duplicate", -1
    return ("background" if best_other <= BACKGROUND else "both"), -1


def mean_ap(
    scores: np.ndarray,
    classes: np.ndarray,
    right: np.ndarray,
    objects: np.ndarray,
    all_: np.ndarray,
) -> float:
    """COCO's AP in percent at one overlap, the mean over the classes that have objects.

    Args:
        scores, classes, right (np.ndarray): (D,) of each detection.
        objects (np.ndarray): (O,) class of each object that is to be found.
        all_ (np.ndarray): classes over which the mean is taken; one without objects counts 0.
    """
    aps = [
        average_precision(scores[classes == c], right[classes == c], int((objects == c).sum()))
        for c in np.unique(all_)
    ]
    return 100 * float(np.mean(aps)) if aps else 0.0


def average_precision(scores: np.ndarray, right: np.ndarray, objects: int) -> float:
    """Mean over the recalls 0, 0.01, ... 1 of the best precision at that recall or above."""
    if not objects:
        return 0.0
    hits = np.cumsum(right[np.argsort(-scores, kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / objects, np.linspace(0, 1, 101))
    return float(np.append(best, 0.0)[places].mean())
