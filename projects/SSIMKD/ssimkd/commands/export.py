"""Writes the student of a checkpoint for plain Detectron2, as every training run does at its end.

    ssimkd export --config-file ssimkd_R50.yaml --weights output/model_0044999.pth --out exported

writes student.pth and student.yaml: the config of the same kind, for DefaultPredictor (.yaml) or
LazyConfig.load (.py). With

    --format torchscript --images a.jpg b.jpg c.jpg

it writes student.ts, and with --format onnx it writes student.onnx: graphs that run without
Detectron2. A graph is only written if it finds the same objects as the detector in these images.
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
        # Vectors stay as they are: a running variance can leave float16's range.
        weights = {k: v.half() if v.dim() > 1 else v for k, v in weights.items()}
    export_student(load_config(args.config_file, args.opts, splits=()), weights, args.out)


def export_graph(args: argparse.Namespace) -> None:
    """Writes student.ts or student.onnx."""
    if args.half:
        raise ConfigError("--half is for --format detectron2 only")
    if len(args.images) < 2:
        raise ConfigError(f"--images: --format {args.format} needs at least two images to check")
    cfg = load_config(args.config_file, args.opts, splits=())
    read = image_reader(cfg)
    images = [read(path)["image"] for path in args.images]
    path = write_graph(load_detector(cfg, args.weights).cpu(), images, args.format, args.out)
    print(f"{path}: agrees with the detector on {len(images)} images")


def parse(words: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("export", __doc__)
    add = parser.add_argument
    add("--weights", required=True, help="the student's checkpoint, a path or URL")
    add("--out", required=True, help="the folder to write to")
    add("--format", choices=("detectron2", *SUFFIXES), default="detectron2", help="what to write")
    add("--images", nargs="+", default=[], help="image files to check a graph on")
    add("--half", action="store_true", help="store matrices in float16, for half the size")
    add_overrides(parser)
    return parser.parse_args(words)


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """The command; `words` are its arguments, by default the process's own."""
    args = parse(words)
    setup_logger(name="ssimkd")
    export_weights(args) if args.format == "detectron2" else export_graph(args)
