#!/usr/bin/env python
"""Writes one HTML page about a finished run: figures, curves, pictures, errors, settings.

    python tools/report.py --run output/shapes/SSIM_student_seed1 \
        --compare output/shapes/vanilla_student_seed1 output/shapes/teacher_seed1

The page needs no network and nothing beside it. A folder of --compare is a twin without teacher,
another student, or the evaluation of the teacher (`train_net.py --eval-only` with its config and
weights). Stay in the folder in which the runs were started: their configs name files from there.
"""

import argparse
import os
from pathlib import Path

from ssimkd.engine.arguments import add_flags
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.report.page import Report
from ssimkd.report.run import Run


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="folder of the run")
    parser.add_argument("--compare", nargs="+", default=[], help="folders of other runs")
    parser.add_argument("--out", help="the page; report.html in the run's folder if left out")
    parser.add_argument("--pictures", help="folder for two small PNGs as well")
    add_flags(parser)
    args = parser.parse_args()
    out = Path(args.out or os.path.join(args.run, "report.html"))
    with exit_in_one_line(args.debug):
        runs = [Run(folder) for folder in (args.run, *args.compare)]
        if not out.parent.is_dir():
            raise ConfigError(f"--out: there is no folder {out.parent}")
        report = Report(runs[0], runs[1:])
        out.write_text(report.html(), encoding="utf-8")
        print(f"Report: {out}")
        if args.pictures:
            print("Pictures:", *report.save_pictures(args.pictures))


if __name__ == "__main__":
    main()
