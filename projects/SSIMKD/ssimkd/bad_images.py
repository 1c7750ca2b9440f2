"""Images that cannot be read: named, or left out of the training and counted."""

import logging
import struct
import zlib
from typing import Any, Callable, Dict, Set

import cv2
from detectron2.engine import HookBase
from detectron2.utils import comm
from PIL.Image import DecompressionBombError

from .errors import ConfigError, one_line

logger = logging.getLogger(__name__)
# What decoders raise, and Detectron2 for a size that is not the annotated one (a ValueError).
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, DecompressionBombError),
    *(cv2.error, struct.error, zlib.error),
)


class BadImageError(ConfigError):
    """An image, or what the data set says of it, cannot be used; the line begins with its file."""


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
            kind = BadImageError if isinstance(error, UNREADABLE) else ConfigError
            raise kind(f"{name}: {one_line(error)}") from error


class CountSkipped(HookBase):
    """Says at the end of a training which images were left out.

    Args:
        loader (ResumableLoader or iterable): its set `skipped` holds a line for each image.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def after_train(self) -> None:
        """Not after a failure, when some processes may be gone."""
        if self.trainer.iter < self.trainer.max_iter or not hasattr(self.loader, "skipped"):
            return
        skipped: Set[str] = set().union(*comm.gather(self.loader.skipped))
        if skipped:
            lines = "\n".join(sorted(skipped))
            logger.warning("%d images were skipped (--skip-bad-images):\n%s", len(skipped), lines)
