"""Loading a trained detector, reading images as its config says, and drawing detections."""

from contextlib import suppress
from typing import Any, Callable, Dict, Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import ColorMode, Visualizer
from torch import nn

from ssimkd.checkpoint.coverage import load_detector_weights
from ssimkd.checkpoint.export import build_detector
from ssimkd.data.bad_images import UNREADABLE
from ssimkd.data.datasets import build_mapper
from ssimkd.errors import ConfigError, as_config_error
from ssimkd.utils.config_keys import for_inference, names_of, setting
from ssimkd.utils.random_state import preserve_random_state

READABLE = 480  # pixels. In smaller images the labels cover the objects.


def load_detector(cfg, weights: str) -> nn.Module:
    """The detector of a config with weights, in evaluation mode. No teacher is built.

    Args:
        cfg (CfgNode or DictConfig): of a student or of a plain detector.
        weights (str): path or URL of a checkpoint.

    Returns:
        nn.Module: on the device of :func:`device_of`.

    Raises:
        ConfigError: the checkpoint cannot be read, or it lacks a tensor.
    """
    model = build_detector(for_inference(cfg))
    absent = load_detector_weights(model, weights, "--weights")
    if absent:
        raise ConfigError(f"--weights: {weights} does not hold {absent[0]} in this config's shape")
    return model.eval().requires_grad_(False).to(device_of(cfg))


def device_of(cfg) -> torch.device:
    """The device of a config, or the CPU where there is no GPU."""
    return torch.device((setting(cfg, "device") or "cuda") if torch.cuda.is_available() else "cpu")


def image_reader(cfg) -> Callable[[str], Dict[str, Any]]:
    """A function that reads an image file and prepares it as an evaluation of the config does.

    Raises:
        ConfigError: a LazyConfig has no `dataloader`. When the function is called: a file is not an
            image.
    """
    if isinstance(cfg, CfgNode):
        mapper: Any = build_mapper(cfg, False)
    elif "dataloader" in cfg:
        mapper = instantiate(cfg.dataloader.test.mapper)
    else:
        raise ConfigError("--config-file: the config has no dataloader: name the run's own .py")

    def read(path: str) -> Dict[str, Any]:
        with as_config_error(f"{path} cannot be read as an image", (*UNREADABLE, ValueError)):
            return mapper({"file_name": path})

    return read


def metadata_of(cfg, categories: Sequence[Dict[str, Any]]) -> Metadata:
    """Detectron2's metadata of a config's first test set, with the names of `categories`."""
    names = names_of(cfg, "TEST")
    known = MetadataCatalog.get(names[0]).as_dict() if names else {}
    classes = {"thing_classes": [category["name"] for category in categories]} if categories else {}
    return Metadata(**{**known, **classes})


def draw_detections(file_name: str, detections: Instances, metadata: Metadata) -> np.ndarray:
    """Draws boxes, masks and keypoints on an image with Detectron2's Visualizer.

    A class has the same colour in every image. The random generators are not changed. A small image
    is enlarged until its short side has READABLE pixels.

    Args:
        file_name (str): the image.
        detections (Instances): in its pixels.
        metadata (Metadata): of the data set, with the names of the classes.

    Returns:
        ndarray: (H, W, 3) uint8, RGB.
    """
    image, detections = read_image(file_name, "RGB"), detections.to("cpu")
    scale = max(1.0, READABLE / min(image.shape[:2]))
    names = metadata.get("thing_classes", None)
    labels = detections.pred_classes.tolist()
    count = len(names) if names else max(labels, default=0) + 1
    colors = [colormap(rgb=True)[i % len(colormap())].tolist() for i in range(count)]
    shown = Metadata(**{**metadata.as_dict(), "thing_colors": colors})
    visualizer = Visualizer(image, shown, scale, ColorMode.SEGMENTATION)
    with preserve_random_state():
        np.random.seed(0)
        drawn = visualizer.draw_instance_predictions(detections)
    return drawn.get_image()


def write_image(path: str, image: np.ndarray) -> None:
    """Writes an RGB image (H, W, 3) in the format of the file's suffix.

    Raises:
        ConfigError: it cannot be written.
    """
    written = False
    with suppress(cv2.error):
        written = cv2.imwrite(path, image[..., ::-1])
    if not written:
        raise ConfigError(f"--output: cannot write {path}")
