"""Annotations of a drawn image in COCO's formats: masks, keypoints, panoptic segments.

owner    uint8 (H, W)           0 where the background is visible, k + 1 where the k-th object is
objects  list[DrawnObject]      in the order of drawing: later ones cover earlier ones
"""

from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np

KEYPOINTS = ("center", "top", "bottom", "left", "right")


class DrawnObject(NamedTuple):
    """An object of an image.

    Attributes:
        label (int): class index.
        box (list[int]): [x, y, w, h] in pixels of the part inside the image, covered or not.
        center (tuple[int, int]): x, y of the pixel that the outline was drawn around.
    """

    label: int
    box: List[int]
    center: Tuple[int, int]


def polygons(mask: np.ndarray) -> List[List[float]]:
    """The parts of a mask as closed paths [x0, y0, x1, y1, ...] along the edges of its pixels.

    They are polygons, since Detectron2's default `INPUT.MASK_FORMAT` does not take RLE. A path runs
    from a part's outline to each of its holes and back. pycocotools fills by the even-odd rule, by
    which the two ways cancel, so that the path decodes exactly to the mask. Coordinates are floats,
    since transforms scale the array in place.

    Args:
        mask (ndarray): (H, W) uint8, 0 or 1.

    Returns:
        list[list[float]]: one path per part. An empty mask gets a path without area, since
        Detectron2 fails where one object of an image has a path and another has none.
    """
    if not mask.any():
        return [[0.0] * 6]
    # OpenCV's contours run through the centres of pixels, not along their edges. In an image of
    # twice the size, 2x stands for the left edge x of a pixel and 2x + 1 for its right edge x + 1.
    double = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, hierarchy = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    corners = [(contour[:, 0] + 1) // 2 for contour in contours]
    parents = hierarchy[0][:, 3]  # A hole's parent is its outline; an outline's is -1.
    parts = []
    for outline in np.flatnonzero(parents < 0):
        start = corners[outline][:1]
        ways = [corners[outline]]
        for hole in np.flatnonzero(parents == outline):
            ways += [start, corners[hole], corners[hole][:1]]
        path = np.concatenate(ways)
        moved = (path != np.roll(path, 1, axis=0)).any(axis=1)  # Concave corners appear twice.
        parts.append(path[moved].ravel().astype(float).tolist())
    return parts


def keypoints(owner: np.ndarray, index: int, center: Tuple[int, int]) -> List[int]:
    """x, y, v of an object's KEYPOINTS: its centre, and the extreme points of its visible part.

    Of several extreme pixels the middle one is taken. COCO's v is 2 for a visible point, 1 for a
    centre that a later object covers, and 0 (with x = y = 0) for the extreme points of an invisible
    object. A ring's centre counts as visible although it lies in the hole.
    """
    x, y = center
    points = [x, y, 1 if owner[y, x] > index + 1 else 2]
    seen = np.argwhere(owner == index + 1)[:, ::-1]  # (P, 2) of x, y, by rows
    if not len(seen):
        return points + [0] * (3 * (len(KEYPOINTS) - 1))
    for axis, extreme in ((1, seen.min), (1, seen.max), (0, seen.min), (0, seen.max)):
        line = seen[seen[:, axis] == extreme(axis=0)[axis]]
        points += [*line[len(line) // 2].tolist(), 2]
    return points


def instances(owner: np.ndarray, objects: Sequence[DrawnObject]) -> List[Dict[str, Any]]:
    """COCO's annotations of an image's objects, without the ids.

    `bbox` bounds the whole object, `segmentation` its visible part. `area`, by which COCO's metric
    divides objects into small, medium and large, is that of the box and not of the mask, so that
    APs and APm stay comparable with the results in docs/.
    """
    annotations = []
    for index, (label, box, center) in enumerate(objects):
        points = keypoints(owner, index, center)
        annotation = dict(category_id=label + 1, bbox=box, area=box[2] * box[3], iscrowd=0)
        annotation["segmentation"] = polygons((owner == index + 1).astype(np.uint8))
        annotation.update(keypoints=points, num_keypoints=sum(v > 0 for v in points[2::3]))
        annotations.append(annotation)
    return annotations


def segments(owner: np.ndarray, objects: Sequence[DrawnObject], background: int) -> List[Dict]:
    """COCO's panoptic segments of an image's visible parts.

    A segment's id is the owner's number plus one, since 0 stands for pixels without a label.
    `background` is the category of the first segment.
    """
    found = []
    for number, category in enumerate([background, *(item.label + 1 for item in objects)]):
        mask = (owner == number).astype(np.uint8)
        if mask.any():
            area, box = cv2.countNonZero(mask), list(cv2.boundingRect(mask))
            found.append(dict(id=number + 1, category_id=category, area=area, bbox=box, iscrowd=0))
    return found
