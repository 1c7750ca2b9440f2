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


# What decoders raise (Pillow a SyntaxError for a broken header), and Detectron2 for an image of
# another size than annotated.
UNREADABLE = (
    *(OSError, EOFError, SyntaxError, DecompressionBombError, SizeMismatchError, BadImageError),
    *(cv2.error, struct.error, zlib.error),
)


class NamingMapper:
    """A mapper whose errors name the image.

    Args:
        mapper (callable): record in Detectron2's format -> what the model takes.

    Raises:
        BadImageError: when called, for an image that cannot be read. Other errors are bugs of the
            mapper and raised as they are.
    """

    def __init__(self, mapper: Callable[[Dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: Dict) -> Any:
        """What the mapper makes of a record."""
        try:
            return self.mapper(record)
        except UNREADABLE as error:
            name = record.get("file_name", record.get("image_id", "an image without a name"))
            raise BadImageError(f"{name}: {one_line(error)}") from error
