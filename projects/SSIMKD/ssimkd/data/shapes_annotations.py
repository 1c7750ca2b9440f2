"""What COCO's formats say of a drawn image: masks, keypoints, panoptic segments.

owner    uint8 (H, W)           0 where the background is seen, k + 1 where the k-th object is
objects  list[DrawnObject]      in the order they were drawn: later ones cover earlier ones
"""

from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np

KEYPOINTS = ("center", "top", "bottom", "left", "right")


class DrawnObject(NamedTuple):
    """An object of an image.

    Attributes:
        label (int): class index.
        box (list[int]): [x, y, w, h] in pixels, of all of it inside the image, covered or not.
        center (tuple[int, int]): x, y of the pixel that the outline was drawn around.
    """

    label: int
    box: List[int]
    center: Tuple[int, int]


def polygons(mask: np.ndarray) -> List[List[float]]:
    """The parts of a mask as closed paths [x0, y0, x1, y1, ...] along the edges of its pixels.

    Polygons and no RLE: Detectron2's default `INPUT.MASK_FORMAT` takes nothing else. A cut leads
    from a part's outline to its hole, and by the even-odd rule, which pycocotools fills by, the way
    there cancels the way back: the path decodes to the mask, pixel for pixel. Floats, since
    transforms scale the array in place.

    Args:
        mask (ndarray): (H, W) uint8, 0 or 1.

    Returns:
        list[list[float]]: one path per part. An empty mask has a path without area: without any,
        Detectron2 would fail on an object that has no mask beside others that have one.
    """
    if not mask.any():
        return [[0.0] * 6]
    # OpenCV joins the outermost points of a region. Doubled, a pixel is 2 x 2 points, each of which
    # lies at a corner of its own: 2x at the pixel's left edge x, 2x + 1 at its right edge x + 1.
    double = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, hierarchy = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    corners = [(contour[:, 0] + 1) // 2 for contour in contours]
    parents = hierarchy[0][:, 3]  # of a hole, its outline; of an outline, -1
    parts = []
    for outline in np.flatnonzero(parents < 0):
        start = corners[outline][:1]
        ways = [corners[outline]]
        for hole in np.flatnonzero(parents == outline):
            ways += [start, corners[hole], corners[hole][:1]]
        path = np.concatenate(ways)
        moved = (path != np.roll(path, 1, axis=0)).any(axis=1)  # concave corners come twice
        parts.append(path[moved].ravel().astype(float).tolist())
    return parts


def keypoints(owner: np.ndarray, index: int, center: Tuple[int, int]) -> List[int]:
    """x, y, v of an object's KEYPOINTS: its centre, and the extremes of what is seen of it.

    Where several pixels are extreme, the middle one counts. v is 2, but 1 for a centre that a later
    object covers, and 0 (with x = y = 0) for the extremes of an object of which nothing is seen.
    A ring's centre counts as seen though it lies in the hole.
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

    `bbox` is of the whole object, `segmentation` of what is seen of it. `area` is the box's and
    not, as in COCO, the mask's: it sorts the objects into small, medium and large, and by the
    mask's, half of the medium ones would be small: APs and APm could not be compared with earlier
    results.
    """
    annotations = []
    for index, (label, box, center) in enumerate(objects):
        points = keypoints(owner, index, center)
        annotations.append(
            {
                "category_id": label + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": polygons((owner == index + 1).astype(np.uint8)),
                "keypoints": points,
                "num_keypoints": sum(v > 0 for v in points[2::3]),
            }
        )
    return annotations


def segments(
    owner: np.ndarray, objects: Sequence[DrawnObject], background: int
) -> List[Dict[str, Any]]:
    """COCO's panoptic segments of an image; what is not seen has none.

    A segment's id is the owner's number plus one, since 0 stands for pixels without a label.
    `background` is the category of the first.
    """
    found = []
    for number, category in enumerate([background, *(item.label + 1 for item in objects)]):
        mask = (owner == number).astype(np.uint8)
        if mask.any():
            found.append(
                {
                    "id": number + 1,
                    "category_id": category,
                    "area": cv2.countNonZero(mask),
                    "bbox": list(cv2.boundingRect(mask)),
                    "iscrowd": 0,
                }
            )
    return found
