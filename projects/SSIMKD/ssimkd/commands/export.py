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

from ssimkd.checkpoint.export import export_student, read_weights
from ssimkd.checkpoint.graph import SUFFIXES, write_graph
from ssimkd.engine.arguments import load_config
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.evaluation.predictor import image_reader, load_detector

from . import add_overrides, command_parser


def export_weights(args: argparse.Namespace) -> None:
    """Writes student.pth and student.yaml."""
    weights = read_weights(args.weights)
    if args.half:
        # Vectors stay as they are because a running variance can leave the range of float16.
        weights = {k: v.half() if v.dim() > 1 else v for k, v in weights.items()}
    export_student(load_config(args.config_file, args.opts, splits=()), weights, args.out)


def export_graph(args: argparse.Namespace) -> None:
    """Writes student.ts or student.onnx."""
    if args.half:
        raise ConfigError("--half works only with --format detectron2")
    if len(args.images) < 2:
        raise ConfigError(f"--images: --format {args.format} needs at least two images to check")
    cfg = load_config(args.config_file, args.opts, splits=())
    read = image_reader(cfg)
    images = [read(path)["image"] for path in args.images]
    path = write_graph(load_detector(cfg, args.weights).cpu(), images, args.format, args.out)
    print(f"{path}: agrees with the detector on {len(images)} images")


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    parser = command_parser("export", __doc__)
    add = parser.add_argument
    add("--weights", required=True, help="path or URL of the student's checkpoint")
    add("--out", required=True, help="folder to write to")
    add(
        "--format",
        choices=("detectron2", *SUFFIXES),
        default="detectron2",
        help="kind of files to write",
    )
    add("--images", nargs="+", default=[], help="image files to check the graph with")
    add("--half", action="store_true", help="store matrices in float16")
    add_overrides(parser)
    args = parser.parse_args(words)
    setup_logger(name="ssimkd")
    export_weights(args) if args.format == "detectron2" else export_graph(args)
