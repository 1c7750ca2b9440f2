"""The command `ssimkd`: which module runs, with which arguments, and how errors end."""

import os
import subprocess
import sys

import pytest
import ssimkd_cli as main
from conftest import ROOT
from detectron2.engine import default_argument_parser
from ssimkd.commands import check, eval, train
from torch.multiprocessing import ProcessExitedException, start_processes


def ssimkd(*args, cwd=ROOT):
    command = [sys.executable, "-m", "ssimkd", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_names_every_module_of_the_folder(words, capsys):
    main.main(words)
    said = capsys.readouterr().out
    folder = ROOT / "projects/SSIMKD/ssimkd/commands"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert set(main.COMMANDS) == modules
    assert all(f"\n  {k:<9}{c.text}" in said for k, c in main.COMMANDS.items())


def test_a_command_gets_the_words_behind_its_name(monkeypatch):
    seen = []
    monkeypatch.setattr(check, "main", seen.append)
    main.main(["check", "--config-file", "a.yaml"])
    monkeypatch.setattr(sys, "argv", ["ssimkd", "check", "--config", "b.yaml", "KEY", "1"])
    main.main()
    assert seen == [["--config-file", "a.yaml"], ["--config", "b.yaml", "KEY", "1"]]


def test_ctrl_c_ends_any_command_with_its_status(monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "main", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main.main(["check", "--config-file", "a.yaml"])


def test_ctrl_c_ends_a_process_of_a_run_with_its_status():
    def interrupted(number, args):
        patch.setattr(train, "read_arguments", raise_interrupt)
        train.run(args)

    def raise_interrupt(args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ProcessExitedException) as ended:
        start_processes(interrupted, (None,), nprocs=2, start_method="fork")
    assert ended.value.exit_code == 130


def test_eval_is_train_with_eval_only(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "main", seen.append)
    eval.main(["--config-file", "a.yaml"])
    assert seen == [["--eval-only", "--config-file", "a.yaml"]]


def test_an_unknown_command_is_named():
    with pytest.raises(SystemExit, match="^error: there is no command 'fly'\n\nusage: ssimkd"):
        main.main(["fly"])


def test_an_error_is_the_last_line_and_status_1():
    done = ssimkd("eval", "--config-file", "configs/shapes/vanilla.yaml")
    assert done.returncode == 1 and "FutureWarning" not in done.stderr
    said = "error: MODEL.WEIGHTS is empty: name the checkpoint to evaluate"
    assert done.stderr.splitlines()[-1] == said


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_says_how_the_command_is_called(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main.main([name, "--help"])
    said = capsys.readouterr().out
    assert f"ssimkd {name} " in said or f"`ssimkd {name}`" in said
    assert "--import MODULE" in said


SCRIPT = """
import sys
from ssimkd_cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not {"torch", "detectron2", "ssimkd"} & set(sys.modules), "imported"
    sys.exit(end.code)
assert not {"torch", "detectron2", "ssimkd"} & set(sys.modules), "imported"
"""


@pytest.mark.parametrize(
    "words, status",
    [(["--help"], 0), (["train", "--help"], 0), (["train", "--nope"], 2), (["fly"], 1)],
)
def test_help_and_wrong_words_need_neither_torch_nor_detectron2(words, status):
    """Their imports take seconds."""
    command = [sys.executable, "-c", SCRIPT, *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "projects/SSIMKD")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == status, done.stderr
    assert status != 2 or done.stderr == "error: unrecognized arguments: --nope\n"


def test_train_has_all_arguments_of_detectron2_with_their_defaults():
    theirs = vars(default_argument_parser().parse_args([]))
    ours = vars(main.parse("train", []))
    assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize("word", ["my/parts.py", "a..b", ""])
def test_import_refuses_what_is_no_module_name(word, capsys):
    with pytest.raises(SystemExit, match="2"):
        main.parse("report", ["run", "--import", word])
    assert "--import: write my_package.my_module" in capsys.readouterr().err
