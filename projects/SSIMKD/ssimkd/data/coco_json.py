"""Checks of a user's annotation file in COCO's format, before a run depends on it."""

import json
import logging
import os
from typing import Any, Dict, List, Sequence

from ssimkd.errors import ConfigError, as_config_error

logger = logging.getLogger(__name__)

# Part of the file -> the keys that each of its entries must have, and the types of their values.
REQUIRED: Dict[str, Dict[str, Any]] = {
    "images": {"id": (int, str), "file_name": str, "height": int, "width": int},
    "annotations": {"id": (int, str), "image_id": (int, str), "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}
SCORED = {"area": (int, float), "iscrowd": int}  # of annotations, which COCO's metric needs


def read_coco(json_file: str, images: str, scored: bool = False) -> Dict[str, Any]:
    """Reads and checks an annotation file.

    Warns of boxes without area or outside their image, which Detectron2 leaves out.

    Args:
        json_file (str): in COCO's format.
        images (str): folder of the images. The first one must exist.
        scored (bool): detections will be compared with the annotations.

    Returns:
        dict: Detectron2's metadata: thing_classes in the order of their ids, and the keypoints'
        names where the categories have some.

    Raises:
        ConfigError: what is wrong with the file. The caller puts the file's name before it.
    """
    with as_config_error("cannot be read", (OSError, ValueError)), open(json_file) as f:
        content = json.load(f)
    for part, keys in REQUIRED.items():
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ConfigError(f"has no list {part!r}")
        if not content[part]:
            raise ConfigError(f"has no {part}")
        check_entries(
            part, content[part], {**keys, **(SCORED if part == "annotations" and scored else {})}
        )
    check_annotations(content)
    warn_of_unseen_boxes(json_file, content)
    first = os.path.join(images, content["images"][0]["file_name"])
    if not os.path.isfile(first):
        raise ConfigError(f"names the image {first}, which does not exist")
    return metadata(sorted(content["categories"], key=lambda category: category["id"]))


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


def check_annotations(content: Dict[str, List[Dict[str, Any]]]) -> None:
    """Raises ConfigError for a malformed box or an unknown image or category."""
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for entry in content["annotations"]:
        if not is_box(entry["bbox"]):
            raise ConfigError(f"has a bbox that is not [x, y, width, height]: {entry}")
        for key, known in (("image_id", images), ("category_id", categories)):
            if entry[key] not in known:
                raise ConfigError(f"has an annotation of the unknown {key} {entry[key]}")


def is_box(bbox: Sequence[Any]) -> bool:
    """Whether these are four numbers x, y, width, height of which the last two are not negative."""
    numbers = all(isinstance(value, (int, float)) for value in bbox)
    return numbers and len(bbox) == 4 and min(bbox[2:]) >= 0


def warn_of_unseen_boxes(json_file: str, content: Dict[str, Any]) -> None:
    """Warns of boxes without area or outside their image.

    Raises:
        ConfigError: all boxes are of this kind.
    """
    images = {image["id"]: image for image in content["images"]}
    unseen = []
    for entry in content["annotations"]:
        image, (x, y, width, height) = images[entry["image_id"]], entry["bbox"]
        inside = x < image["width"] and y < image["height"] and x + width > 0 and y + height > 0
        if not (inside and width and height):
            unseen.append(f"id {entry['id']} in {image['file_name']}")
    if len(unseen) == len(content["annotations"]):
        raise ConfigError("has no box with an area inside its image: nothing can be learned")
    if unseen:
        logger.warning(
            "%s: %d of %d boxes have no area or lie outside their image and are not learned: %s",
            *(json_file, len(unseen), len(content["annotations"]), ", ".join(unseen[:3])),
        )


def metadata(categories: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Detectron2's metadata of COCO's categories. A flip swaps left and right keypoints."""
    found: Dict[str, Any] = {"thing_classes": [category["name"] for category in categories]}
    names = categories[0].get("keypoints")
    if names:
        mirrored = [(name, name.replace("left", "right")) for name in names if "left" in name]
        found["keypoint_names"] = names
        found["keypoint_flip_map"] = [pair for pair in mirrored if pair[1] in names]
        found["keypoint_connection_rules"] = []
    return found
