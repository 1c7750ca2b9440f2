"""Counts parameters and FLOPs of a student and of its teachers, and times them.

    ssimkd analyze --config-file ssimkd_R50.yaml --weights output/student.pth --image street.jpg

The image is prepared as in an evaluation of the config. Without --image it is noise of 640 x 480
pixels. fvcore counts the FLOPs, and a multiplication and its addition count as one. The operators
that it does not count are listed below the table. The speed is the median of --repeats runs on this
machine. Without --weights the student has random weights. It then finds fewer objects and is faster
than a trained one. The same holds for a teacher whose checkpoint cannot be read.
"""

import logging
import os
import tempfile
from collections import Counter
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from torch import Tensor

from ssimkd.checkpoint.export import build_detector
from ssimkd.engine.arguments import load_config
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.evaluation.predictor import device_of, image_reader, load_detector
from ssimkd.modeling.several_teachers import distillers_in
from ssimkd.report.model_cost import flop_counter
from ssimkd.utils.config_keys import for_inference
from ssimkd.utils.lazy_fields import naming_lazy_fields
from ssimkd.utils.measure import clock_of, interleave, markdown

from . import begin, load_trained

logger = logging.getLogger("ssimkd.analyze")
HEAD = ("", "weights", "parameters", "GFLOPs", "of these backbone and neck", "images/s")


class Detector(NamedTuple):
    """A detector in evaluation mode, and whether its weights come from a checkpoint."""

    model: Any
    trained: bool


def teachers_of(cfg) -> Iterator[Tuple[str, Any]]:
    """Name and TeacherSpec of each teacher that a config names."""
    for name, distiller in distillers_in(cfg):
        if distiller.spec.config:
            yield f"teacher {name}".rstrip(), distiller.spec


def load_all(cfg, weights: str) -> Dict[str, Detector]:
    """The student and its teachers, by the names of the table's rows."""
    device = device_of(cfg)
    if weights:
        student = load_detector(cfg, weights)
    else:
        student = build_detector(for_inference(cfg)).eval().to(device)
    found = {"student": Detector(student, bool(weights))}
    for name, spec in teachers_of(cfg):
        try:
            found[name] = Detector(spec.load(device)[0], True)
        except ConfigError as error:
            logger.warning("%s has random weights: %s", name, error)
            found[name] = Detector(spec.build(spec.load_config(), device).eval(), False)
    return found


def read_image(cfg, path: str) -> Tensor:
    """An image (3, H, W) as the detectors take it. It is noise if no path is given."""
    with tempfile.TemporaryDirectory() as folder:
        if not path:
            path = os.path.join(folder, "noise.png")
            noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
            cv2.imwrite(path, noise)
        return image_reader(cfg)(path)["image"]


@torch.no_grad()
def count_flops(model: Any, image: Tensor) -> Tuple[float, float, Counter]:
    """FLOPs of a detector, FLOPs of its backbone and neck, and operators that are not counted."""
    flops = flop_counter(model, image)
    return flops.total(), flops.by_module()["model.backbone"], flops.unsupported_ops()


@torch.no_grad()
def table(cfg, weights: str, image: Tensor, repeats: int) -> str:
    """The table in Markdown, and a line with the operators that were not counted."""
    detectors = load_all(cfg, weights)
    calls = {name: lambda m=d.model: m([{"image": image}]) for name, d in detectors.items()}
    seconds = interleave(calls, repeats, clock_of(device_of(cfg)))
    rows = []
    uncounted: Counter = Counter()
    for name, (model, trained) in detectors.items():
        total, backbone, missing = count_flops(model, image)
        uncounted |= missing
        parameters = sum(p.numel() for p in model.parameters())
        cells = [name, "trained" if trained else "random", f"{parameters / 1e6:.2f} M"]
        cells += [f"{total / 1e9:.2f}", f"{backbone / 1e9:.2f}", f"{1 / seconds[name]:.2f}"]
        rows.append(cells)
    operators = ", ".join(f"{name} x {count}" for name, count in sorted(uncounted.items()))
    return f"{markdown(HEAD, rows)}\n\nNot counted (most per detector): {operators}"


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    args = begin("analyze", words)
    setup_logger(name="ssimkd")
    if args.weights:  # it tells the number of classes
        cfg = load_trained(args).cfg
    else:
        cfg = load_config(args.config_file, args.opts, splits=())
    image = read_image(cfg, args.image)
    with naming_lazy_fields(not isinstance(cfg, CfgNode)):
        text = table(cfg, args.weights, image, args.repeats)
    height, width = image.shape[1:]
    where = torch.cuda.get_device_name() if device_of(cfg).type == "cuda" else "CPU"
    print(f"\n{text}\n\nImage of {height} x {width} pixels; {where}, torch {torch.__version__}")
