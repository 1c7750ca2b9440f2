"""Writes one HTML page about a finished run: results, curves, pictures, errors, settings.

    ssimkd report --run output/student --compare output/vanilla output/teacher

The page needs no network and no other file. A folder of --compare is the same student trained
without a teacher, another student, or an evaluation of the teacher (`ssimkd eval` with its config
and weights). Run it in the folder in which the runs were started: their configs name files from
there.
"""

import argparse
import os
from pathlib import Path
from typing import Optional, Sequence

from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.report.page import Report
from ssimkd.report.run import Run


def parse(words: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "ssimkd report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", required=True, help="folder of the run")
    add("--compare", nargs="+", default=[], help="folders of other runs")
    add("--out", help="the page; by default report.html in the run's folder")
    return parser.parse_args(words)


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """The command; `words` are its arguments, by default the process's own."""
    args = parse(words)
    out = Path(args.out or os.path.join(args.run, "report.html"))
    runs = [Run(folder) for folder in (args.run, *args.compare)]
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")
    out.write_text(Report(runs[0], runs[1:]).html(), encoding="utf-8")
    print(f"Report: {out}")
