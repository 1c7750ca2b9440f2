"""Writes one HTML page about a finished run: results, curves, pictures, errors, settings.

    ssimkd report --run output/student --compare output/vanilla output/teacher

The page needs no network and no other file. A folder of --compare holds the same student trained
without a teacher, another student, or an evaluation of the teacher (`ssimkd eval` with its config
and weights). Run the command in the folder in which the runs were started, because paths in their
configs start there.
"""

import argparse
import os
from pathlib import Path
from typing import Optional, Sequence

from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.report.page import Report
from ssimkd.report.run import Run


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    parser = argparse.ArgumentParser(
        "ssimkd report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", required=True, help="folder of the run")
    add("--compare", nargs="+", default=[], help="folders of other runs")
    add("--out", help="file to write (report.html in the folder of the run)")
    args = parser.parse_args(words)
    out = Path(args.out or os.path.join(args.run, "report.html"))
    runs = [Run(folder) for folder in (args.run, *args.compare)]
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")
    out.write_text(Report(runs[0], runs[1:]).html(), encoding="utf-8")
    print(f"Report: {out}")
