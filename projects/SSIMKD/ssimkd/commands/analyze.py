#!/usr/bin/env python
r"""Parameters, FLOPs and speed of a student beside its teachers'.

    python tools/analyze.py --config-file configs/ssimkd_R50.yaml --weights output/student.pth

One image of 640 x 480 pixels, or --image, is prepared as in an evaluation of the config and shown
to each. FLOPs are fvcore's: a multiplication with its addition is one. What it does not count is
listed below the table. The speed is the median of --repeats, after one that does not count, on this
machine. Without --weights the student's are random: it finds less, and its second stage has less to
do, than one that was trained; the same for a teacher whose checkpoint cannot be fetched.
"""

import argparse
import logging
import os
import tempfile
import time
from collections import Counter
from typing import Any, Dict, Iterator, NamedTuple, Tuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.utils.logger import setup_logger
from torch import Tensor

import ssimkd  # noqa: F401 (first: it silences warnings of other packages)
from ssimkd.checkpoint.export import build_plain, plain_config
from ssimkd.engine.arguments import add_flags, load_config
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.evaluation.predictor import device_of, image_reader, load_detector
from ssimkd.modeling.several_teachers import build_distiller
from ssimkd.report.model_cost import flop_counter
from ssimkd.utils.measure import interleave, markdown

logger = logging.getLogger("ssimkd.analyze")
HEAD = ("", "weights", "parameters", "GFLOPs", "of these backbone and neck", "images/s")


class Detector(NamedTuple):
    """A detector to be looked at.

    Attributes:
        model (nn.Module): in evaluation mode.
        trained (bool): its weights are no random ones.
    """

    model: Any
    trained: bool


def teachers_of(cfg) -> Iterator[Tuple[str, Any]]:
    """Name and TeacherSpec of each teacher that a config names."""
    if isinstance(cfg, CfgNode):
        distiller: Any = build_distiller(cfg)
    else:
        distiller = instantiate(cfg.model.get("distiller"))
    for name, one in distiller.named() if distiller else ():
        if one.spec.config:
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
            logger.warning("%s: random weights, since %s", name, error)
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
    """FLOPs of a detector and of its backbone with neck; how often it runs what is not counted."""
    flops = flop_counter(model, image)
    return flops.total(), flops.by_module()["model.backbone"], flops.unsupported_ops()


@torch.no_grad()
def run(model: Any, image: Tensor) -> None:
    """One inference, to its end."""
    model([{"image": image}])
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(cfg, weights: str, image: Tensor, repeats: int) -> str:
    """Markdown: a row per detector, and what was not counted."""
    detectors = load_all(cfg, weights)
    calls = {name: lambda m=d.model: run(m, image) for name, d in detectors.items()}
    seconds = interleave(calls, repeats, time.perf_counter)
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


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", "--config", required=True, help="config of a student")
    parser.add_argument("--weights", default="", help="its checkpoint, path or URL")
    parser.add_argument("--image", default="", help="file to measure on")
    parser.add_argument("--repeats", type=int, default=5, help="timed inferences of each")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the config, last")
    add_flags(parser)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    setup_logger(name="ssimkd")
    with exit_in_one_line(args.debug):
        cfg = load_config(args.config_file, args.opts, splits=())
        image = read_image(cfg, args.image)
        text = table(cfg, args.weights, image, args.repeats)
    height, width = image.shape[1:]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"\n{text}\n\nOn an image of {height} x {width} pixels; {where}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
