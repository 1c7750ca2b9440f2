"""Warnings of other packages that do not help a user of a command."""

import logging
import warnings

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
