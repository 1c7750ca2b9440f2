"""Checks of a user's annotation file in COCO's format, before a run depends on it."""

import json
import logging
import os
from typing import Any, Dict, List

from ssimkd.errors import ConfigError, as_config_error

logger = logging.getLogger(__name__)

# Part of the file -> the keys that each of its entries must have, and the types of their values.
REQUIRED: Dict[str, Dict[str, Any]] = {
    "images": {"id": (int, str), "file_name": str, "height": int, "width": int},
    "annotations": {"id": (int, str), "image_id": (int, str), "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}
# Largest share of boxes that cannot be learned which `ssimkd check` lists as a note, not as a
# warning.
FEW = 0.01
SIDES = {"l_": "r_", "L_": "R_"}  # how names of keypoints may begin
NO_PAIRS = (
    "no two keypoints are called left and right, or l_ and r_, so a flip exchanges none of them"
)
SCORED = {"area": (int, float), "iscrowd": int}  # COCO's metric needs these of annotations, too.


def read_coco(
    json_file: str, images: str, scored: bool = False, labeled: bool = True
) -> Dict[str, Any]:
    """Reads and checks an annotation file.

    A warning counts the boxes without area or outside their image, which are not learned.

    Args:
        json_file (str): in COCO's format.
        images (str): folder of the images. The first one must exist.
        scored (bool): detections will be compared with the annotations.
        labeled (bool): False: only the list of images is read, and the metadata is empty.

    Returns:
        dict: Detectron2's metadata: thing_classes in the order of their ids, these ids, and the
        names of keypoints where the categories have some. A flip swaps left and right keypoints.

    Raises:
        ConfigError: what is wrong with the file. The caller puts the file's name before it.
    """
    with as_config_error("cannot be read", (OSError, ValueError)), open(json_file) as f:
        content = json.load(f)
    for part, keys in REQUIRED.items() if labeled else [("images", REQUIRED["images"])]:
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ConfigError(f"has no list {part!r}")
        if not content[part]:
            raise ConfigError(f"has no {part}")
        more = SCORED if scored and part == "annotations" else {}
        check_entries(part, content[part], {**keys, **more})
    first = os.path.join(images, content["images"][0]["file_name"])
    if not os.path.isfile(first):
        raise ConfigError(f"names the image {first}, which does not exist")
    if not labeled:
        return {}
    check_boxes(json_file, content)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    found: Dict[str, Any] = {
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }
    names = categories[0].get("keypoints")
    if names:
        pairs = [(name, right) for name in names for right in right_of(name) if right in names]
        found["keypoint_flip_map"] = pairs
        if not pairs:
            logger.warning("%s: %s", json_file, NO_PAIRS, extra={"harmless": True})
        found.update(keypoint_names=names, keypoint_connection_rules=[])
    return found


def list_json_images(json_file: str, images: str) -> List[Dict[str, Any]]:
    """The images of a file that :func:`read_coco` has checked, as Detectron2's records."""
    with open(json_file) as f:
        entries = json.load(f)["images"]
    return [
        {
            "file_name": os.path.join(images, entry["file_name"]),
            "image_id": entry["id"],
            "height": entry["height"],
            "width": entry["width"],
        }
        for entry in entries
    ]


def right_of(name: str) -> List[str]:
    """What the right one of two keypoints may be called, by the name of the left one."""
    words = [("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")]
    names = [name.replace(left, right) for left, right in words if left in name]
    return names + [right + name[2:] for left, right in SIDES.items() if name.startswith(left)]


def check_entries(part: str, entries: List[Any], keys: Dict[str, Any]) -> None:
    """Raises ConfigError for an entry without a key, with a value of another type, or a used id."""
    ids = set()
    for entry in entries:
        for key, kind in keys.items():
            if not isinstance(entry, dict) or key not in entry:
                raise ConfigError(f"has an entry of {part!r} without {key!r}: {entry}")
            if not isinstance(entry[key], kind):
                raise ConfigError(f"has an entry of {part!r} with a wrong {key!r}: {entry}")
        if entry["id"] in ids:
            raise ConfigError(f"has the id {entry['id']} twice in {part!r}")
        ids.add(entry["id"])


def check_boxes(json_file: str, content: Dict[str, Any]) -> None:
    """Warns of boxes without area or outside their image.

    Raises:
        ConfigError: a box is malformed, its image or category is unknown, or all boxes are of the
            kind above.
    """
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    unseen = []
    for entry in content["annotations"]:
        for key, known in (("image_id", images), ("category_id", categories)):
            if entry[key] not in known:
                raise ConfigError(f"has an annotation of the unknown {key} {entry[key]}")
        box, image = entry["bbox"], images[entry["image_id"]]
        numbers = all(isinstance(value, (int, float)) for value in box)
        if not (numbers and len(box) == 4 and min(box[2:]) >= 0):
            raise ConfigError(f"has a bbox that is not [x, y, width, height]: {entry}")
        x, y, width, height = box
        inside = -width < x < image["width"] and -height < y < image["height"]
        if not (inside and width and height):
            unseen.append(f"id {entry['id']} in {image['file_name']}")
    if len(unseen) == len(content["annotations"]):
        raise ConfigError("has no box with an area inside its image: nothing can be learned")
    if unseen:
        boxes = len(content["annotations"])
        logger.warning(
            "%s: %d of %d boxes have no area or lie outside their image and are not learned: %s",
            *(json_file, len(unseen), boxes, ", ".join(unseen[:3])),
            extra={"harmless": len(unseen) <= FEW * boxes},
        )
