"""Errors of images that cannot be read name the image."""

import struct
import zlib
from typing import Any, Callable, Dict

import cv2
from detectron2.data.detection_utils import SizeMismatchError
from PIL.Image import DecompressionBombError

from ssimkd.errors import ConfigError, one_line


class BadImageError(ConfigError):
    """An image cannot be read. The message begins with its file.

    A user's own mapper can raise it, too.
    """


# Decoders raise these; Pillow raises SyntaxError for a broken header. SizeMismatchError is
# Detectron2's for an image of another size than annotated.
UNREADABLE = (
    *(OSError, EOFError, SyntaxError, DecompressionBombError, SizeMismatchError, BadImageError),
    *(cv2.error, struct.error, zlib.error),
)


class NamingMapper:
    """Wraps a mapper (record -> item), so that its errors name the image.

    Raises:
        BadImageError: when called, for an image that cannot be read. Other errors are bugs of the
            mapper and are raised unchanged.
    """

    def __init__(self, mapper: Callable[[Dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: Dict) -> Any:
        """Maps a record in Detectron2's format."""
        try:
            return self.mapper(record)
        except UNREADABLE as error:
            name = record.get("file_name", record.get("image_id", "an image without a name"))
            raise BadImageError(f"{name}: {one_line(error)}") from error
