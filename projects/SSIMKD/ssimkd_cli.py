"""`ssimkd COMMAND [ARGUMENTS]` runs `ssimkd/commands/COMMAND.py`.

This file has the arguments of every command. It imports neither torch nor Detectron2, whose imports
take seconds. So --help and a wrong argument are answered at once.
"""

import argparse
import ast
import importlib
import os
import sys
from pathlib import Path
from typing import Callable, NamedTuple, NoReturn, Optional, Sequence

ITERATIONS = {"check": 5, "weight": 20}  # the fewest iterations that can be measured
Add = Callable[..., object]


class Parser(argparse.ArgumentParser):
    """A wrong argument ends the command with one line and status 2."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        self.exit(2, f"error: {message}\n")


def parse(name: str, words: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The arguments of a command.

    Args:
        name (str): a key of COMMANDS.
        words (sequence[str] or None): None takes those of this process.
    """
    source = Path(__file__).parent / f"ssimkd/commands/{name}.py"
    parser = Parser(
        f"ssimkd {name}",
        description=ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--import",
        dest="imports",
        type=module,
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of your own to import first, such as one that registers a backbone; "
        "may be given several times",
    )
    COMMANDS[name].arguments(add)
    args = parser.parse_args(words)
    for word in getattr(args, "opts", ()):
        if word.startswith("--"):
            parser.error(f"{word}: flags stand before the overrides")
    return args


def add_config(add: Add) -> None:
    """The config of a command."""
    text = "path of a .yaml or .py config, or the name of one of this project's configs"
    add("--config-file", "--config", required=True, metavar="FILE", help=text)


def add_overrides(add: Add) -> None:
    """The overrides of the config, which come last on a command line."""
    text = "overrides of the config: KEY VALUE (.yaml) or key=value (.py)"
    add("opts", nargs=argparse.REMAINDER, help=text)


def train(add: Add) -> None:
    """Arguments of `ssimkd train` and `ssimkd eval`: Detectron2's and this project's own."""
    add("--config-file", default="", metavar="FILE", help="path or name of a .yaml or .py config")
    add("--resume", action="store_true", help="continue from the last checkpoint of the run")
    add("--eval-only", action="store_true", help="evaluate, and train nothing")
    add("--num-gpus", type=int, default=1, help="number of GPUs per machine (1)")
    add("--num-machines", type=int, default=1, help="number of machines (1)")
    add("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    # as in Detectron2, a user's runs take the same port, so that orphan processes are noticed
    port = 2**15 + 2**14 + hash(os.getuid() if sys.platform != "win32" else 1) % 2**14
    url = f"tcp://127.0.0.1:{port}"
    add("--dist-url", default=url, help="address at which processes meet; see torch.distributed")
    text = "replace an image that cannot be read by another one; the log says how many"
    add("--skip-bad-images", action="store_true", help=text)
    text = "show only progress, results and warnings on the terminal; log.txt has everything"
    add("--quiet", action="store_true", help=text)
    text = "minutes that a process waits for another one before the run ends (30)"
    add("--timeout", type=minutes, default=30.0, metavar="MINUTES", help=text)
    add_overrides(add)


def check(add: Add) -> None:
    """Arguments of `ssimkd check`."""
    add_config(add)
    add("--num-gpus", type=at_least(1), default=1, help="number of GPUs of the long run (1)")
    least = at_least(ITERATIONS["check"])
    add("--iterations", type=least, default=20, help="iterations of the short run (20)")
    add_overrides(add)


def weight(add: Add) -> None:
    """Arguments of `ssimkd weight`."""
    add_config(add)
    least = at_least(ITERATIONS["weight"])
    add("--iters", type=least, default=300, help="number of iterations (300)")
    add("--num-gpus", type=at_least(1), default=1, help="number of GPUs (1)")
    add_overrides(add)


def predict(add: Add) -> None:
    """Arguments of `ssimkd predict`."""
    add_config(add)
    add("images", nargs="+", help="image files")
    add("--weights", default="", help="path or URL of the checkpoint (the config's)")
    add("--output", required=True, help="folder for the drawings and predictions.json")
    text = "lowest score to draw and list (0.5)"
    add("--confidence-threshold", type=score, default=0.5, help=text)
    text = "overrides of the config, which come last"
    add("--opts", nargs=argparse.REMAINDER, default=[], help=text)


def export(add: Add) -> None:
    """Arguments of `ssimkd export`."""
    add_config(add)
    add("--weights", required=True, help="path or URL of the student's checkpoint")
    add("--out", required=True, help="folder to write to")
    kinds = ("detectron2", "torchscript", "onnx")
    add("--format", choices=kinds, default=kinds[0], help="kind of files to write (detectron2)")
    text = "two or more images on which a graph is compared with the detector; not the last flag "
    text += "before overrides"
    add("--images", nargs="+", default=[], help=text)
    add("--half", action="store_true", help="store matrices in float16 (detectron2 only)")
    add_overrides(add)


def report(add: Add) -> None:
    """Arguments of `ssimkd report`."""
    add("runs", nargs="+", metavar="RUN", help="folder of a run; the page is about the first one")
    add("--out", help="file to write (report.html in the folder of the first run)")


def analyze(add: Add) -> None:
    """Arguments of `ssimkd analyze`."""
    add_config(add)
    add("--weights", default="", help="path or URL of the student's checkpoint")
    add("--image", default="", help="image file to measure with (noise)")
    add("--repeats", type=at_least(1), default=5, help="number of timed runs (5)")
    add_overrides(add)


class Command(NamedTuple):
    """What the help says of a command, and the function that adds its arguments to a parser."""

    text: str
    arguments: Callable[[Add], None]


COMMANDS = {
    "train": Command("train a detector, with a teacher or without", train),
    "eval": Command("measure a detector's AP", train),
    "check": Command("check teacher and student before a long run", check),
    "weight": Command("propose a weight for the distillation losses", weight),
    "predict": Command("draw and list the objects that a detector finds in images", predict),
    "export": Command("write a student for plain Detectron2, TorchScript or ONNX", export),
    "report": Command("write a page about runs", report),
    "analyze": Command("count parameters and FLOPs of student and teacher, and time them", analyze),
}
HELP = "\n".join(
    ["usage: ssimkd COMMAND [ARGUMENTS]; ssimkd COMMAND --help shows the arguments\n"]
    + [f"  {name:<9}{command.text}" for name, command in COMMANDS.items()]
)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number and at least `least`."""

    def parse(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    parse.__name__ = "whole number"  # argparse names it when int() fails
    return parse


def module(text: str) -> str:
    """The name of a module."""
    if not all(part.isidentifier() for part in text.split(".")):
        raise argparse.ArgumentTypeError(f"write my_package.my_module, not {text}")
    return text


def score(text: str) -> float:
    """A score of a detection."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return float(text)


def minutes(text: str) -> float:
    """A time that PyTorch can wait for, in minutes."""
    if not 0 < float(text) <= 1e6:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1e6 minutes, got {text}")
    return float(text)


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
    parse(name, arguments)  # before the imports, which take seconds
    try:
        importlib.import_module("ssimkd.utils.known_warnings").silence_known_warnings()
        importlib.import_module(f"ssimkd.commands.{name}").main(arguments)
    except KeyboardInterrupt:
        sys.exit(130)  # the status of a program that Ctrl-C has ended


if __name__ == "__main__":
    main()
