#!/usr/bin/env python
r"""Writes the student of a checkpoint for stock Detectron2, as every training run does at its end.

    python tools/export_student.py --config-file configs/ssimkd_R50.yaml \
        --weights output/ssimkd_R50/model_0044999.pth --out output/exported

makes student.pth and student.yaml in output/exported. A `.yaml` config becomes one for
DefaultPredictor, a `.py` config one for LazyConfig.load.
"""

import argparse

from detectron2.utils.logger import setup_logger
from ssimkd.checkpoint_file import trust_checkpoints
from ssimkd.cli import add_flags, load_config
from ssimkd.errors import exit_in_one_line
from ssimkd.export import export_student, read_weights


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="config of the distilled run")
    parser.add_argument("--weights", required=True, help="its checkpoint, path or URL")
    parser.add_argument("--out", required=True, help="folder of the two files")
    parser.add_argument(
        "--half", action="store_true", help="store kernels and matrices in float16: half the size"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the config")
    add_flags(parser)
    args = parser.parse_args()
    trust_checkpoints(args.trust_checkpoint)
    setup_logger(name="ssimkd")
    with exit_in_one_line(args.debug):
        weights = read_weights(args.weights)
        if args.half:
            # Vectors stay as they are: a running variance can leave float16's range.
            weights = {k: v.half() if v.dim() > 1 else v for k, v in weights.items()}
        export_student(load_config(args.config_file, args.opts, splits=()), weights, args.out)


if __name__ == "__main__":
    main()
