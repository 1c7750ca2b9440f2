"""Writes the student of a checkpoint for plain Detectron2, as every training run does at its end.

    ssimkd export --config-file ssimkd_R50.yaml --weights output/model_0044999.pth --out exported

writes student.pth and student.yaml. The latter is a config of the same kind, for DefaultPredictor
(from .yaml) or LazyConfig.load (from .py). With

    --format torchscript --images a.jpg b.jpg c.jpg

it writes the graph student.ts, and with --format onnx it writes student.onnx. Both run without
Detectron2. A graph is written only if it finds the same objects as the detector in these images.
"""

import argparse
from typing import Optional, Sequence

from detectron2.utils.logger import setup_logger

from ssimkd.checkpoint.export import export_student
from ssimkd.checkpoint.graph import write_graph
from ssimkd.checkpoint.reader import read_weights
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.evaluation.predictor import image_reader, load_detector

from . import begin, load_trained


def export_weights(args: argparse.Namespace) -> None:
    """Writes student.pth and student.yaml."""
    cfg, path, categories = load_trained(args)
    weights = read_weights(path)
    if args.half:
        # Vectors stay as they are because a running variance can leave the range of float16.
        weights = {k: v.half() if v.dim() > 1 else v for k, v in weights.items()}
    export_student(cfg, weights, args.out, categories)


def export_graph(args: argparse.Namespace) -> None:
    """Writes student.ts or student.onnx."""
    if args.half:
        raise ConfigError("--half works only with --format detectron2")
    if len(args.images) < 2:
        raise ConfigError(f"--images: --format {args.format} needs at least two images to check")
    cfg, path, categories = load_trained(args)
    read = image_reader(cfg)
    images = [read(path)["image"] for path in args.images]
    model = load_detector(cfg, path).cpu()
    path = write_graph(model, images, args.format, args.out, categories)
    print(f"{path}: agrees with the detector on {len(images)} images")


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    args = begin("export", words)
    setup_logger(name="ssimkd")
    export_weights(args) if args.format == "detectron2" else export_graph(args)
