"""Checks of the data sets that a run names, before anything is built."""

import os
from typing import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from .errors import ConfigError
from .shapes import FOLDER


def check_datasets(names: Sequence[str], key: str) -> None:
    """Raises ConfigError unless every data set is registered and its files exist.

    Args:
        names (sequence[str]): names in Detectron2's DatasetCatalog.
        key (str): the config key that names them.
    """
    missing = []
    for name in names:
        if name not in DatasetCatalog:
            raise ConfigError(f"{key}: no data set {name!r} is registered")
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
