"""The command `ssimkd`: `ssimkd COMMAND [ARGUMENTS]` runs the module of that name in this folder."""

import importlib
import sys

COMMANDS = {
    "train": "train a detector, with a teacher or without",
    "eval": "measure a detector's AP",
    "check": "look at teacher and student before a long run",
    "weight": "propose the weight of the losses",
    "predict": "draw and list the detections in images",
    "export": "write a student for plain Detectron2, TorchScript or ONNX",
    "report": "write one page about a run",
    "analyze": "parameters, FLOPs and speed of student and teacher",
}
HELP = "\n".join(
    ["usage: ssimkd COMMAND [ARGUMENTS]; ssimkd COMMAND --help shows them\n"]
    + [f"  {name:<9}{text}" for name, text in COMMANDS.items()]
)


def main() -> None:
    """Runs the command that `sys.argv` names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
        return
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}\n\n{HELP}")
    sys.argv = [f"ssimkd {name}", *arguments]
    importlib.import_module(f"ssimkd.commands.{name}").main()


if __name__ == "__main__":
    main()
