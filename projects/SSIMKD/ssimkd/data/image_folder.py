"""A folder of images without labels as records in Detectron2's format."""

import os
from typing import Any, Dict, List, Tuple

from PIL import Image

from ssimkd.errors import ConfigError

from .bad_images import UNREADABLE

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values for a quarter turn


def list_images(folder: str) -> List[Dict[str, Any]]:
    """The records of all images in a folder and in the folders below it, in the order of names.

    Raises:
        ConfigError: it holds no image.
    """
    paths = sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES)
    )
    if not paths:
        raise ConfigError(f"DATASETS.COCO: {folder} holds no image ({', '.join(SUFFIXES)})")
    records = []
    for path in paths:
        height, width = size_of(path)
        record = dict(file_name=path, image_id=os.path.relpath(path, folder))
        records.append({**record, "height": height, "width": width})
    return records


def size_of(path: str) -> Tuple[int, int]:
    """Height and width as Detectron2 reads an image, from its header.

    An image that cannot be read is 0 x 0 here. The mapper names it, or another one replaces it.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = is_turned(image)
    except UNREADABLE:
        return 0, 0
    return (width, height) if turned else (height, width)


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF data turns an image by a quarter. Detectron2 ignores damaged EXIF data, too."""
    try:
        return image.getexif().get(ORIENTATION) in TURNED
    except Exception:  # Pillow raises many types
        return False
