"""Images that cannot be read: named, or left out of the training and counted."""

import struct
import zlib
from traceback import walk_tb
from typing import Any, Callable, Dict

import cv2
from PIL.Image import DecompressionBombError

from ssimkd.errors import ConfigError, one_line

READERS = ("PIL", "detectron2.data.detection_utils")  # modules that read images and annotations


class BadImageError(ConfigError):
    """An image, or what the data set says of it, cannot be used; the line begins with its file."""


# What decoders raise, or a user's own mapper to say so.
UNREADABLE = (
    *(OSError, EOFError, DecompressionBombError, BadImageError),
    *(cv2.error, struct.error, zlib.error),
)


def is_unreadable(error: Exception) -> bool:
    """Whether an error says that data cannot be read; a mapper's bug is none of them.

    A ValueError (such as Detectron2's of a size that is not the annotated one) or a SyntaxError
    (Pillow's) may be either: it counts where it comes out of one of READERS.
    """
    if isinstance(error, UNREADABLE):
        return True
    if not isinstance(error, (ValueError, SyntaxError)):
        return False
    modules = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    return any(f"{module}.".startswith(f"{reader}.") for module in modules for reader in READERS)


class NamingMapper:
    """A mapper whose failures name the image.

    Args:
        mapper (callable): record in Detectron2's format -> what the model takes.

    Raises:
        BadImageError: when called, of an image that cannot be read.
        ConfigError: when called, whatever else the mapper raised: no image is to blame.
    """

    def __init__(self, mapper: Callable[[Dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: Dict) -> Any:
        """What the mapper makes of a record."""
        name = record.get("file_name", record.get("image_id", "an image without a name"))
        try:
            return self.mapper(record)
        except Exception as error:
            kind = BadImageError if is_unreadable(error) else ConfigError
            raise kind(f"{name}: {one_line(error)}") from error
