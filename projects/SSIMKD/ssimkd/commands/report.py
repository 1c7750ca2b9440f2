"""Writes one HTML page about a finished run: results, curves, pictures, errors, settings.

    ssimkd report output/student output/vanilla output/teacher

The page is about the first run. The others are the same student trained without a teacher, other
students, or an evaluation of the teacher (`ssimkd eval` with its config and weights). Runs that
differ only in their SEED become one row: mean and standard deviation. The page needs no network and
no other file. Run the command in the folder in which the runs were started, because paths in their
configs start there.
"""

import os
from pathlib import Path
from typing import Optional, Sequence

from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.report.page import Report
from ssimkd.report.run import Run

from . import begin


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    args = begin("report", words)
    out = Path(args.out or os.path.join(args.runs[0], "report.html"))
    runs = [Run(folder) for folder in args.runs]
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")
    out.write_text(Report(runs).html(), encoding="utf-8")
    print(f"Report: {out}")
