"""Silences warnings of other packages that say nothing to a user; imported before they are."""

import logging
import warnings

# Detectron2 and fvcore compile functions when they are imported; newer torch advises against it.
warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
# Detectron2's own use of torch and numpy
for known in ("Creating a tensor from a list of numpy", "torch.meshgrid: in an upcoming release"):
    warnings.filterwarnings("ignore", known, UserWarning)
# Detectron2's list of the environment asks for a compiler, on machines without a GPU as well.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: "No CUDA runtime" not in record.getMessage()
)
