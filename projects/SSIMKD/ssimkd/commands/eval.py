"""`ssimkd eval`: measures a detector's AP; `ssimkd train --eval-only`."""

import sys

from . import train


def main() -> None:
    """Command line of `ssimkd eval`."""
    train.main(["--eval-only", *sys.argv[1:]])
