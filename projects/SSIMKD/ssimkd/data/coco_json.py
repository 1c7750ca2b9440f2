"""A user's annotation file in COCO's format: what it must hold, before a run depends on it."""

import json
import logging
import os
from typing import Any, Dict, List, Tuple

from ssimkd.errors import ConfigError, as_config_error

logger = logging.getLogger(__name__)
MOST = 1e9  # pixels of a side, beyond which a number is none


# Part of the file -> the keys of its entries, and the kind of their values.
REQUIRED: Dict[str, Dict[str, Tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,), "height": (int,), "width": (int,)},
    "annotations": {
        "id": (int, str),
        "image_id": (int, str),
        "category_id": (int,),
        "bbox": (list,),
    },
    "categories": {"id": (int,), "name": (str,)},
}
SCORED: Dict[str, Tuple[type, ...]] = {"area": (int, float), "iscrowd": (int,)}


def read_coco(json_file: str, images: str, scored: bool = False) -> Dict[str, Any]:
    """Reads and checks an annotation file; warns of objects that no detector can find.

    Args:
        json_file (str): in COCO's format: images, annotations, categories.
        images (str): folder of the images; the first one must be there.
        scored (bool): detections are compared with it: that needs an area of each annotation.

    Returns:
        dict: metadata for Detectron2: thing_classes in the order of their ids, and the keypoints
        where the categories name some.

    Raises:
        ConfigError: what is wrong with the file, to be put after its name.
    """
    with (
        as_config_error("cannot be read", (OSError, RecursionError, ValueError)),
        open(json_file) as f,
    ):
        content = json.load(f)
    parts = ("images", "annotations", "categories")
    for part in parts:
        if not (isinstance(content, dict) and isinstance(content.get(part), list)):
            raise ConfigError(f"has no list {part!r}")
        if not content[part]:
            raise ConfigError(f"has no {part}")
    ids: Dict[str, set] = {}
    for part in parts:
        kinds = dict(REQUIRED[part], **(SCORED if scored and part == "annotations" else {}))
        ids[part] = check_entries(part, content[part], kinds)
    check_annotations(content["annotations"], ids)
    warn_of_boxes_outside(json_file, content)
    first = os.path.join(images, content["images"][0]["file_name"])
    if not os.path.isfile(first):
        raise ConfigError(f"names the image {first}, which does not exist")
    return metadata(sorted(content["categories"], key=lambda category: category["id"]))


def check_entries(part: str, entries: List[Any], kinds: Dict[str, Tuple[type, ...]]) -> set:
    """The ids of a part's entries.

    Raises:
        ConfigError: an entry lacks a key, has a value of another kind, or the id of another one.
    """
    ids = set()
    for entry in entries:
        if not isinstance(entry, dict):
            raise ConfigError(f"has an entry of {part!r} that is no mapping: {entry!r}")
        for key, kind in kinds.items():
            if key not in entry:
                raise ConfigError(f"has an entry of {part!r} without {key!r}: {entry}")
            if not isinstance(entry[key], kind):
                raise ConfigError(f"has an entry of {part!r} with a wrong {key!r}: {entry}")
        if entry["id"] in ids:
            raise ConfigError(f"has the id {entry['id']} twice in {part!r}")
        ids.add(entry["id"])
    return ids


def check_annotations(annotations: List[Dict[str, Any]], ids: Dict[str, set]) -> None:
    """Raises ConfigError for a box or shape that is none, or an unknown image or category."""
    for entry in annotations:
        box = entry["bbox"]
        if not (numbers(box) and len(box) == 4 and min(box[2:]) >= 0):
            raise ConfigError(f"has a bbox that is not [x, y, width, height]: {entry}")
        if type(entry.get("iscrowd", 0)) is not int or entry.get("iscrowd", 0) not in (0, 1):
            raise ConfigError(f"has an 'iscrowd' that is neither 0 nor 1: {entry}")
        points = entry.get("keypoints") or []
        if not numbers(points) or len(points) % 3:
            raise ConfigError(f"has 'keypoints' that are not [x, y, v, ...]: {entry}")
        if not is_mask(entry.get("segmentation") or []):
            raise ConfigError(f"has a 'segmentation' that is no list of polygons, nor RLE: {entry}")
        for key, part in (("image_id", "images"), ("category_id", "categories")):
            if entry[key] not in ids[part]:
                raise ConfigError(f"has an annotation of the unknown {key} {entry[key]}")


def numbers(values: Any) -> bool:
    """Whether this is a list of finite numbers that pixels can have."""
    return isinstance(values, list) and all(
        type(x) in (int, float) and abs(x) < MOST for x in values
    )


def is_mask(segmentation: Any) -> bool:
    """Whether this is COCO's list of polygons [x, y, ...], or its RLE: `size` and `counts`."""
    if not isinstance(segmentation, dict):
        return isinstance(segmentation, list) and all(map(numbers, segmentation))
    size, counts = segmentation.get("size", []), segmentation.get("counts")
    return numbers(size) and len(size) == 2 and (isinstance(counts, str) or numbers(counts))


def warn_of_boxes_outside(json_file: str, content: Dict[str, Any]) -> None:
    """Warns of boxes without area or outside their image: Detectron2 leaves them out.

    Raises:
        ConfigError: all are.
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
    """What Detectron2 keeps of COCO's categories; left and right keypoints are swapped in flips."""
    found: Dict[str, Any] = {"thing_classes": [category["name"] for category in categories]}
    names = categories[0].get("keypoints")
    if names:
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ConfigError(f"has 'keypoints' in a category that are no list of names: {names!r}")
        mirrored = [(name, name.replace("left", "right")) for name in names if "left" in name]
        found["keypoint_names"] = names
        found["keypoint_flip_map"] = [pair for pair in mirrored if pair[1] in names]
        found["keypoint_connection_rules"] = []
    return found
