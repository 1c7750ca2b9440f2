"""The data sets that a run names: a user's own, and checks of all before anything is built."""

import json
import os
from typing import Any, List, Mapping, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .errors import ConfigError, one_line
from .shapes import FOLDER

KEYS = {"NAME", "JSON", "IMAGES"}


def register_coco(entries: Sequence[Mapping[str, str]]) -> None:
    """Registers a user's data in COCO's format; class names come from the json.

    Args:
        entries (sequence[mapping]): NAME (for DATASETS.TRAIN and TEST), JSON (annotation file),
            IMAGES (folder). An entry that is registered already as it stands is left alone.

    Raises:
        ConfigError: a key is missing or unknown, a file does not exist or holds no categories, or
            another data set has the name.
    """
    key = "DATASETS.COCO"
    for entry in entries:
        if not isinstance(entry, Mapping) or set(entry) != KEYS:
            raise ConfigError(
                f"{key}: an entry is a mapping of {', '.join(sorted(KEYS))}, got {entry!r}"
            )
        name, json_file, images = (str(entry[k]) for k in ("NAME", "JSON", "IMAGES"))
        if not os.path.isdir(images):
            raise ConfigError(f"{key}: {name}: there is no folder {images}")
        classes = read_classes(json_file, f"{key}: {name}")
        if name not in DatasetCatalog:
            register_coco_instances(name, {"thing_classes": classes}, json_file, images)
        found = MetadataCatalog.get(name)
        if (found.get("json_file"), found.get("image_root")) != (json_file, images):
            raise ConfigError(f"{key}: another data set is called {name}: choose another NAME")


def read_classes(json_file: str, key: str) -> List[str]:
    """Class names in a COCO annotation file, in the order of their ids.

    Raises:
        ConfigError: it cannot be read, or is not an annotation file of COCO's format.
    """
    try:
        with open(json_file) as f:
            content = json.load(f)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        classes = [category["name"] for category in categories]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{key}: cannot read {json_file}: {one_line(error)}") from error
    if not classes:
        raise ConfigError(f"{key}: {json_file} has no categories")
    return classes


def check_datasets(names: Sequence[str], key: str) -> None:
    """Raises ConfigError unless every data set is registered and its files exist.

    Args:
        names (sequence[str]): names in Detectron2's DatasetCatalog.
        key (str): the config key that names them.
    """
    missing = []
    for name in names:
        if name not in DatasetCatalog:
            raise ConfigError(
                f"{key}: no data set {name!r} is registered; DATASETS.COCO (.yaml) or "
                "datasets.coco (.py) registers your own"
            )
        if name.startswith(FOLDER):
            continue  # drawn on first use
        metadata = MetadataCatalog.get(name)
        paths = [metadata.get("json_file"), metadata.get("image_root")]
        missing += [
            path for path in paths if path and "://" not in path and not os.path.exists(path)
        ]
    if missing:
        raise ConfigError(
            f"{key}: Detectron2 does not find the data, {' and '.join(missing)} do not exist; "
            "set the environment variable DETECTRON2_DATASETS to the folder that holds coco/ "
            f"(it is {os.getenv('DETECTRON2_DATASETS', 'unset: ./datasets')})"
        )


def classes_of(names: Sequence[str], key: str) -> int:
    """Number of object classes of the first of several registered data sets.

    Raises:
        ConfigError: there is none, or it does not name its classes.
    """
    classes = MetadataCatalog.get(names[0]).get("thing_classes", ()) if names else ()
    if not classes:
        raise ConfigError(f"{key}: there is no data set that names its classes, to count them")
    return len(classes)


def check_classes(model: Any, names: Sequence[str], key: str) -> None:
    """Raises ConfigError unless a detector's head has as many classes as the data.

    Args:
        model (nn.Module): a detector; one whose number of classes is not known is left alone.
        names (sequence[str]): of data sets.
        key (str): the config key that names them.
    """
    holder = getattr(model, "roi_heads", model)
    expected = getattr(holder, "num_classes", None)
    for name in names:
        found = len(MetadataCatalog.get(name).get("thing_classes", ()))
        if isinstance(expected, int) and found and found != expected:
            raise ConfigError(
                f"{key}: {name} has {found} classes and the head has {expected}: set NUM_CLASSES "
                "of MODEL.ROI_HEADS or MODEL.RETINANET (.yaml), num_classes of the model (.py), or "
                "DATASETS.NUM_CLASSES_FROM_DATA (datasets.num_classes_from_data)"
            )
