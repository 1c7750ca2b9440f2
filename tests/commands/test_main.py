"""The command `ssimkd`: which module runs, with which arguments, and how errors end."""

import subprocess
import sys

import pytest
from conftest import ROOT
from ssimkd.commands import check, eval, main, train


def ssimkd(*args, cwd=ROOT):
    command = [sys.executable, "-m", "ssimkd", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_names_every_module_of_the_folder(words, capsys):
    main.main(words)
    said = capsys.readouterr().out
    folder = ROOT / "projects/SSIMKD/ssimkd/commands"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "main"}
    assert set(main.COMMANDS) == modules
    assert all(f"\n  {name:<9}{text}" in said for name, text in main.COMMANDS.items())


def test_a_command_gets_the_words_behind_its_name(monkeypatch):
    seen = []
    monkeypatch.setattr(check, "main", seen.append)
    main.main(["check", "--config-file", "a.yaml"])
    monkeypatch.setattr(sys, "argv", ["ssimkd", "check", "KEY", "1"])
    main.main()
    assert seen == [["--config-file", "a.yaml"], ["KEY", "1"]]


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


@pytest.mark.parametrize("name", sorted(set(main.COMMANDS) - {"train", "eval"}))
def test_help_says_how_the_command_is_called(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main.main([name, "--help"])
    assert f"\n    ssimkd {name} --" in capsys.readouterr().out
