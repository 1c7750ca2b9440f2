"""`ssimkd eval`: measures a detector's AP; it is `ssimkd train --eval-only`."""

import sys
from typing import Optional, Sequence

from . import train


def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    train.main(["--eval-only", *(sys.argv[1:] if words is None else words)])
