"""The format in which images are read: BGR, RGB, grey and others that Detectron2 knows."""

from typing import Any, Mapping, Sequence

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from PIL import Image

from ssimkd.errors import ConfigError


def check_format(key: str, name: Any, pixels: Mapping[str, Sequence[float]]) -> None:
    """Raises ConfigError unless a detector can take images that are read in a format.

    Args:
        key (str): the config key that names the format.
        name (str): the format.
        pixels (mapping[str, sequence[float]]): config key -> means or deviations by channel, the
            means first. A grey image fills as many channels as there are means.
    """
    channels = channels_of(name)
    if not channels:
        known = ", ".join(filter(channels_of, ("BGR", *Image.MODES)))
        raise ConfigError(f"{key}: {name!r} is none of {known}")
    for pixel, values in pixels.items():
        wanted = channels if channels > 1 else len(next(iter(pixels.values())))
        if len(values) != wanted:
            raise ConfigError(
                f"{pixel} must hold the {wanted} numbers of {key} {name}, got {list(values)}"
            )


def channels_of(name: Any) -> int:
    """Channels of the images that Detectron2 reads in a format; 0: a detector takes none such."""
    try:  # grey files are read as well
        images = [convert_PIL_to_numpy(Image.new(mode, (1, 1)), name) for mode in ("RGB", "L")]
    except Exception:  # what Pillow raises for a format depends on the format
        return 0
    # palettes and bits have no axis of channels; YUV-BT.601 is float64, which no weights are
    fit = all(image.ndim == 3 and image.dtype == np.uint8 for image in images)
    return images[0].shape[-1] if fit else 0
