"""The command `ssimkd`: each of its commands is a script of the checkout, run as by python."""

import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from ssimkd.commands import main as console

FROM_INSTALL = "from ssimkd.console import main; main()"  # what pip makes of [project.scripts]


def ssimkd(*args, cwd=ROOT, **options):
    command = [sys.executable, "-c", FROM_INSTALL, *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


def test_help_lists_every_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ssimkd", "--help"])
    console.main()
    said = capsys.readouterr().out
    for name, (script, _, text) in console.COMMANDS.items():
        assert f"  {name:<9}{text} ({script})\n" in said
        assert (ROOT / script).is_file()


@pytest.mark.parametrize("name", console.COMMANDS)
def test_a_command_gets_its_arguments_as_its_script_does(name, monkeypatch):
    script, first, _ = console.COMMANDS[name]
    seen = []
    monkeypatch.setattr(console.Path, "is_file", lambda path: True)
    monkeypatch.setattr(console.runpy, "run_path", lambda *args, **kw: seen.append((args, kw)))
    monkeypatch.setattr(sys, "argv", ["ssimkd", name, "--option", "KEY", "1"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    console.main()
    assert seen == [((str(ROOT / script),), {"run_name": "__main__"})]
    assert sys.argv == [str(ROOT / script), *first, "--option", "KEY", "1"]


def test_a_script_with_neighbours_runs_from_any_folder(tmp_path):
    """compare.py imports compare_runs.py, which only python's own start puts on the path."""
    done = ssimkd("compare", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: compare.py"), done.stderr


def test_the_module_runs_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ssimkd", "--help"])
    monkeypatch.delitem(sys.modules, "ssimkd.commands.main")
    runpy.run_module("ssimkd.commands.main", run_name="__main__")
    assert capsys.readouterr().out == console.HELP + "\n"


def test_an_error_keeps_its_one_line_and_status():
    done = ssimkd("eval", "--config-file", "configs/shapes/vanilla.yaml")
    assert done.returncode == 1
    said = "error: MODEL.WEIGHTS is empty: name the checkpoint to evaluate"
    assert done.stderr.splitlines()[-1] == said


def test_an_unknown_command_and_no_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ssimkd", "fly"])
    with pytest.raises(SystemExit, match="error: there is no command 'fly'\n\nusage: ssimkd"):
        console.main()
    (tmp_path / "lib/python/site-packages/ssimkd").mkdir(parents=True)
    copy = tmp_path / "lib/python/site-packages/ssimkd/console.py"
    shutil.copy(console.__file__, copy)
    monkeypatch.setattr(console, "__file__", str(copy))
    monkeypatch.setattr(sys, "argv", ["ssimkd", "train"])
    with pytest.raises(SystemExit, match="train_net.py is not there: .* pip install -e ."):
        console.main()
