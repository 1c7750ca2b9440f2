"""The command `ssimkd`: one name for the scripts of the checkout that was installed by pip."""

import runpy
import sys
from pathlib import Path

# command -> script, the arguments that it is given first, and what it does
COMMANDS = {
    "train": ("train_net.py", (), "train a detector, with a teacher or without"),
    "eval": ("train_net.py", ("--eval-only",), "measure a detector's AP"),
    "predict": ("tools/predict.py", (), "draw and list the detections in images"),
    "check": ("tools/check_pair.py", (), "look at teacher and student before a long run"),
    "weight": ("tools/suggest_weight.py", (), "propose the weight of the losses"),
    "export": ("tools/export_student.py", (), "a student for stock Detectron2, or as a graph"),
    "report": ("tools/report.py", (), "write one page about a run"),
    "analyze": ("tools/analyze.py", (), "parameters, FLOPs and speed of student and teacher"),
    "compare": ("tools/compare.py", (), "train the embedded data's student with every method"),
    "bench": ("tools/benchmark.py", ("--loss",), "time the loss against other implementations"),
}
HELP = "\n".join(
    ["usage: ssimkd COMMAND [ARGUMENTS]; ssimkd COMMAND --help shows them\n"]
    + [f"  {name:<9}{text} ({script})" for name, (script, _, text) in COMMANDS.items()]
)


def main() -> None:
    """Runs a command's script in this process, as `python <script> [ARGUMENTS]` would."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
        return
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}\n\n{HELP}")
    script, first, _ = COMMANDS[name]
    path = Path(__file__).resolve().parents[3] / script
    if not path.is_file():
        sys.exit(
            f"error: {path} is not there: the commands are a checkout's scripts; install it from "
            "there by pip install -e ."
        )
    sys.argv = [str(path), *first, *arguments]
    sys.path[0] = str(path.parent)  # as python does for a script: some import their neighbours
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
