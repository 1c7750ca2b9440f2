"""Counts parameters and FLOPs of a student and of its teachers, and times them.

    ssimkd analyze --config-file ssimkd_R50.yaml --weights output/student.pth --image street.jpg

One image is prepared as in an evaluation of the config; without --image it is noise of 640 x 480
pixels. FLOPs are fvcore's: a multiplication with its addition is one; operators that it does not
count are listed below the table. The speed is the median of --repeats runs on this machine.
Without --weights the student's weights are random. It then finds fewer objects, which makes it
faster than a trained one. The same holds for a teacher whose checkpoint cannot be read.
"""

import argparse
import logging
import os
import tempfile
from collections import Counter
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.utils.logger import setup_logger
from torch import Tensor

from ssimkd.checkpoint.export import build_plain, plain_config
from ssimkd.engine.arguments import load_config
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.evaluation.predictor import device_of, image_reader, load_detector
from ssimkd.modeling.several_teachers import Distillers, build_distiller
from ssimkd.report.model_cost import flop_counter
from ssimkd.utils.measure import clock_of, interleave, markdown

from . import add_overrides, at_least, command_parser

logger = logging.getLogger("ssimkd.analyze")
HEAD = ("", "weights", "parameters", "GFLOPs", "of these backbone and neck", "images/s")


class Detector(NamedTuple):
    """A detector to be measured.

    Attributes:
        model (nn.Module): in evaluation mode.
        trained (bool): its weights come from a checkpoint.
    """

    model: Any
    trained: bool


def teachers_of(cfg) -> Iterator[Tuple[str, Any]]:
    """Name and TeacherSpec of each teacher that a config names."""
    lazy = not isinstance(cfg, CfgNode)
    distiller: Any = instantiate(cfg.model.get("distiller")) if lazy else build_distiller(cfg)
    pairs: Any = distiller.named() if isinstance(distiller, Distillers) else [("", distiller)]
    for name, one in pairs:
        if one is not None and one.spec.config:
            yield f"teacher {name}".rstrip(), one.spec


def load_all(cfg, weights: str) -> Dict[str, Detector]:
    """The student and its teachers, by the names of the table's rows."""
    device = device_of(cfg)
    if weights:
        student = load_detector(cfg, weights)
    else:
        student = build_plain(plain_config(cfg, "")).eval().to(device)
    found = {"student": Detector(student, bool(weights))}
    for name, spec in teachers_of(cfg):
        try:
            found[name] = Detector(spec.load(device)[0], True)
        except ConfigError as error:
            logger.warning("%s has random weights: %s", name, error)
            found[name] = Detector(spec.build(spec.load_config(), device).eval(), False)
    return found


def read_image(cfg, path: str) -> Tensor:
    """(3, H, W) as the detectors take it; noise where no path is given."""
    with tempfile.TemporaryDirectory() as folder:
        if not path:
            path = os.path.join(folder, "noise.png")
            noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
            cv2.imwrite(path, noise)
        return image_reader(cfg)(path)["image"]


@torch.no_grad()
def count_flops(model: Any, image: Tensor) -> Tuple[float, float, Counter]:
    """FLOPs of a detector, those of its backbone with neck, and operators that are not counted."""
    flops = flop_counter(model, image)
    return flops.total(), flops.by_module()["model.backbone"], flops.unsupported_ops()


@torch.no_grad()
def table(cfg, weights: str, image: Tensor, repeats: int) -> str:
    """Markdown: a row per detector, and the operators that were not counted."""
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


def parse(words: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("analyze", __doc__)
    add = parser.add_argument
    add("--weights", default="", help="the student's checkpoint, a path or URL")
    add("--image", default="", help="an image file to measure on")
    add("--repeats", type=at_least(1), default=5, help="timed runs of each detector (5)")
    add_overrides(parser)
    return parser.parse_args(words)


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """The command; `words` are its arguments, by default the process's own."""
    args = parse(words)
    setup_logger(name="ssimkd")
    cfg = load_config(args.config_file, args.opts, splits=())
    image = read_image(cfg, args.image)
    text = table(cfg, args.weights, image, args.repeats)
    height, width = image.shape[1:]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{text}\n\nImage of {height} x {width} pixels; {where}, torch {torch.__version__}")
