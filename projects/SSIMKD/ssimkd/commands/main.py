"""`ssimkd COMMAND [ARGUMENTS]` runs the module of that name in this folder."""

import importlib
import sys
from typing import Optional, Sequence

from ssimkd.utils.known_warnings import silence_known_warnings

COMMANDS = {
    "train": "train a detector, with a teacher or without",
    "eval": "measure a detector's AP",
    "check": "check teacher and student before a long run",
    "weight": "propose a weight for the distillation losses",
    "predict": "draw and list the objects that a detector finds in images",
    "export": "write a student for plain Detectron2, TorchScript or ONNX",
    "report": "write a page about a run",
    "analyze": "count parameters and FLOPs of student and teacher, and time them",
}
HELP = "\n".join(
    ["usage: ssimkd COMMAND [ARGUMENTS]; ssimkd COMMAND --help shows the arguments\n"]
    + [f"  {name:<9}{text}" for name, text in COMMANDS.items()]
)


def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs a command.

    Args:
        words (sequence[str]): its name and its arguments, or None for those of this process.
    """
    name, *arguments = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
        return
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}\n\n{HELP}")
    silence_known_warnings()
    importlib.import_module(f"ssimkd.commands.{name}").main(arguments)


if __name__ == "__main__":
    main()
