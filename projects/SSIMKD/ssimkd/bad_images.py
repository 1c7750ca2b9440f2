"""Images that cannot be read: named, or left out of the training and counted."""

import logging
from typing import Any, Callable, Dict, Set

from detectron2.engine import HookBase
from detectron2.utils import comm

from .errors import ConfigError, one_line

logger = logging.getLogger(__name__)


class BadImageError(ConfigError):
    """An image, or what the data set says of it, cannot be used; the line begins with its file."""


class NamingMapper:
    """A mapper whose failures name the image.

    Args:
        mapper (callable): record in Detectron2's format -> what the model takes.

    Raises:
        BadImageError: when called, whatever the mapper raised.
    """

    def __init__(self, mapper: Callable[[Dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: Dict) -> Any:
        """What the mapper makes of a record."""
        name = record.get("file_name", record.get("image_id", "an image without a name"))
        try:
            return self.mapper(record)
        except Exception as error:  # a broken file can make a decoder raise anything
            raise BadImageError(f"{name}: {one_line(error)}") from error


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
