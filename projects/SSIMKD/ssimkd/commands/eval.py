"""`ssimkd eval`: measures a detector's AP; it is `ssimkd train --eval-only`."""

import sys
from typing import Optional, Sequence

from . import train


def main(words: Optional[Sequence[str]] = None) -> None:
    """The command; `words` are its arguments, by default the process's own."""
    train.main(["--eval-only", *(sys.argv[1:] if words is None else words)])
