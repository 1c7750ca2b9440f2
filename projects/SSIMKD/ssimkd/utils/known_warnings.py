"""Warnings of other packages that say nothing to a user of a command."""

import logging
import warnings

KNOWN = (  # start of the text, category
    (r"`torch\.jit\.", FutureWarning),  # Detectron2 and fvcore compile small functions
    ("Creating a tensor from a list of numpy", UserWarning),
    ("torch.meshgrid: in an upcoming release", UserWarning),
)


def silence_known_warnings() -> None:
    """For this process; called by commands, never on import."""
    for text, category in KNOWN:
        warnings.filterwarnings("ignore", text, category)
    # Detectron2's list of the environment asks for a compiler, on machines without a GPU as well.
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime" not in record.getMessage()
    )
