#!/usr/bin/env python
"""Writes a page about a finished run: results, curves, pictures, kinds of errors, settings.

    ssimkd report --run output/student --compare output/vanilla output/teacher

The page is one HTML file. A folder of --compare is any other run: the same student trained without
a teacher, another student, or an evaluation of the teacher (`train_net.py --eval-only` with its
config and weights). Start it in the folder in which the runs were started, because their configs
name files from there.
"""

import argparse
import os
from pathlib import Path

from ssimkd.engine.arguments import add_flags
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.report.page import Report
from ssimkd.report.run import Run


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="folder of the run")
    parser.add_argument("--compare", nargs="+", default=[], help="folders of other runs")
    parser.add_argument("--out", help="the page; default: report.html in the run's folder")
    add_flags(parser)
    args = parser.parse_args()
    out = Path(args.out or os.path.join(args.run, "report.html"))
    with exit_in_one_line(args.debug):
        runs = [Run(folder) for folder in (args.run, *args.compare)]
        if not out.parent.is_dir():
            raise ConfigError(f"--out: there is no folder {out.parent}")
        out.write_text(Report(runs[0], runs[1:]).html(), encoding="utf-8")
    print(f"Report: {out}")


if __name__ == "__main__":
    main()
