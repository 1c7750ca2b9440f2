"""Warnings of other packages that do not help a user of a command, or that are repeated."""

import logging
import warnings
from typing import Set

KNOWN = (  # start of the text, category
    (r"`torch\.jit\.", FutureWarning),  # of small functions that Detectron2 and fvcore compile
    ("Creating a tensor from a list of numpy", UserWarning),
    ("torch.meshgrid: in an upcoming release", UserWarning),
)


def silence_known_warnings() -> None:
    """Silences them in this process. Commands call it; an import never does."""
    for text, category in KNOWN:
        warnings.filterwarnings("ignore", text, category)
    # Detectron2 looks for CUDA when it lists the environment. torch then warns where there is none.
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime" not in record.getMessage()
    )
    # Detectron2 reads an annotation file at each evaluation, with the same warnings.
    logging.getLogger("detectron2.data.datasets.coco").addFilter(FirstTime())


class FirstTime(logging.Filter):
    """Lets each warning pass once."""

    def __init__(self) -> None:
        super().__init__()
        self.said: Set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Called by the logger."""
        if record.levelno < logging.WARNING:
            return True
        text = record.getMessage()
        first = text not in self.said
        self.said.add(text)
        return first
