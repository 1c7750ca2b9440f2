#!/usr/bin/env python
r"""Writes the student of a checkpoint for stock Detectron2, as every training run does at its end.

    python tools/export_student.py --config-file configs/ssimkd_R50.yaml \
        --weights output/ssimkd_R50/model_0044999.pth --out output/exported

makes student.pth and student.yaml in output/exported. A `.yaml` config becomes one for
DefaultPredictor, a `.py` config one for LazyConfig.load. With

    --format torchscript --images a.jpg b.jpg c.jpg

it is student.ts, with --format onnx student.onnx: a graph that runs without Detectron2, written
only if it finds in these images what the detector finds. docs/tools.md says what goes in and comes
out, and which detectors cannot be a graph.
"""

import argparse

from detectron2.utils.logger import setup_logger

import ssimkd  # noqa: F401 (first: it silences warnings of other packages)
from ssimkd.checkpoint.export import export_student, read_weights
from ssimkd.checkpoint.graph import SUFFIXES, write_graph
from ssimkd.engine.arguments import add_flags, load_config
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.evaluation.predictor import image_reader, load_detector


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
        raise ConfigError("--half: for --format detectron2 alone")
    if len(args.images) < 2:
        raise ConfigError(f"--images: --format {args.format} needs two, better more, to be checked")
    cfg = load_config(args.config_file, args.opts, splits=())
    read = image_reader(cfg)
    images = [read(path)["image"] for path in args.images]
    path = write_graph(load_detector(cfg, args.weights).cpu(), images, args.format, args.out)
    print(f"{path}: agrees with the detector on {len(images)} images")


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", "--config", required=True, help="config of the distilled run"
    )
    parser.add_argument("--weights", required=True, help="its checkpoint, path or URL")
    parser.add_argument("--out", required=True, help="folder of what is written")
    parser.add_argument(
        "--format", choices=("detectron2", *SUFFIXES), default="detectron2", help="what is written"
    )
    parser.add_argument(
        "--images", nargs="+", default=[], help="files, before another option: to check a graph on"
    )
    parser.add_argument(
        "--half", action="store_true", help="store kernels and matrices in float16: half the size"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the config, last")
    add_flags(parser)
    args = parser.parse_args()
    setup_logger(name="ssimkd")
    with exit_in_one_line(args.debug):
        export_weights(args) if args.format == "detectron2" else export_graph(args)


if __name__ == "__main__":
    main()
