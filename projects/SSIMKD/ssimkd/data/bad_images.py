"""Errors of images that cannot be read name the image."""

import struct
import zlib
from traceback import walk_tb
from typing import Any, Callable, Dict

import cv2
from PIL.Image import DecompressionBombError

from ssimkd.errors import ConfigError, one_line

READERS = ("PIL", "detectron2.data.detection_utils")  # modules that read images and annotations


class BadImageError(ConfigError):
    """An image or its annotation cannot be read. The message begins with the image's file."""


# What decoders raise. A user's own mapper can raise BadImageError.
UNREADABLE = (
    *(OSError, EOFError, DecompressionBombError, BadImageError),
    *(cv2.error, struct.error, zlib.error),
)


def is_unreadable(error: Exception) -> bool:
    """Whether an error means that data cannot be read, and not that a mapper has a bug.

    A ValueError (Detectron2's for an image of another size than annotated) or a SyntaxError
    (Pillow's) counts where it was raised below one of READERS.
    """
    if isinstance(error, UNREADABLE):
        return True
    if not isinstance(error, (ValueError, SyntaxError)):
        return False
    modules = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    return any(f"{module}.".startswith(f"{reader}.") for module in modules for reader in READERS)


class NamingMapper:
    """A mapper whose errors name the image.

    Args:
        mapper (callable): record in Detectron2's format -> what the model takes.

    Raises:
        BadImageError: when called, for an image that cannot be read.
    """

    def __init__(self, mapper: Callable[[Dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: Dict) -> Any:
        """What the mapper makes of a record."""
        name = record.get("file_name", record.get("image_id", "an image without a name"))
        try:
            return self.mapper(record)
        except Exception as error:
            if not is_unreadable(error):  # It is a bug in the mapper and keeps its traceback.
                raise
            raise BadImageError(f"{name}: {one_line(error)}") from error
