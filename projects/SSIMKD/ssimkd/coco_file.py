"""A user's annotation file in COCO's format: what it must hold, before a run depends on it."""

import json
import os
from typing import Any, Dict, List

from .errors import ConfigError, one_line


def read_coco(json_file: str, images: str) -> Dict[str, Any]:
    """Reads and checks an annotation file.

    Args:
        json_file (str): in COCO's format: images, annotations, categories.
        images (str): folder of the images; the first one must be there.

    Returns:
        dict: metadata for Detectron2: thing_classes in the order of their ids, and the keypoints
        where the categories name some.

    Raises:
        ConfigError: what is wrong with the file, to be put after its name.
    """
    try:
        with open(json_file) as f:
            content = json.load(f)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {one_line(error)}") from error
    parts = ("images", "annotations", "categories")
    for part in parts:
        if not (isinstance(content, dict) and isinstance(content.get(part), list)):
            raise ConfigError(f"has no list {part!r}")
        if not content[part]:
            raise ConfigError(f"has no {part}")
    required = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    ids: Dict[str, set] = {part: set() for part in parts}
    for part in parts:
        for entry in content[part]:
            lacking = [key for key in required[part] if key not in entry]
            if lacking:
                raise ConfigError(f"has an entry of {part!r} without {lacking[0]!r}: {entry}")
            if entry["id"] in ids[part]:
                raise ConfigError(f"has the id {entry['id']} twice in {part!r}")
            ids[part].add(entry["id"])
    check_annotations(content["annotations"], ids)
    first = os.path.join(images, content["images"][0]["file_name"])
    if not os.path.isfile(first):
        raise ConfigError(f"names the image {first}, which does not exist")
    return metadata(sorted(content["categories"], key=lambda category: category["id"]))


def check_annotations(annotations: List[Dict[str, Any]], ids: Dict[str, set]) -> None:
    """Raises ConfigError for a box that is none, or an image or category that is unknown."""
    for entry in annotations:
        box = entry["bbox"]
        if not (isinstance(box, list) and len(box) == 4):
            raise ConfigError(f"has a bbox that is not [x, y, width, height]: {entry}")
        for key, part in (("image_id", "images"), ("category_id", "categories")):
            if entry[key] not in ids[part]:
                raise ConfigError(f"has an annotation of the unknown {key} {entry[key]}")


def metadata(categories: List[Dict[str, Any]]) -> Dict[str, Any]:
    """What Detectron2 keeps of COCO's categories; left and right keypoints are swapped in flips."""
    found: Dict[str, Any] = {"thing_classes": [category["name"] for category in categories]}
    names = categories[0].get("keypoints")
    if names:
        mirrored = [(name, name.replace("left", "right")) for name in names if "left" in name]
        found["keypoint_names"] = names
        found["keypoint_flip_map"] = [pair for pair in mirrored if pair[1] in names]
        found["keypoint_connection_rules"] = []
    return found
