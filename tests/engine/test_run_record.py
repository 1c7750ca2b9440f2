"""`run.json` says how a run was made."""

import re
import subprocess

import pytest
from ssimkd import ConfigError
from ssimkd.engine import run_record
from ssimkd.engine.run_record import (
    command_line,
    keep_config,
    read_record,
    record_run,
)


@pytest.mark.parametrize("content", ['[{"comm', "3"])
def test_an_unreadable_record_is_renamed_and_a_new_one_begins(tmp_path, caplog, content):
    (tmp_path / "run.json").write_text(content)
    with record_run(str(tmp_path), []):
        assert len(read_record(str(tmp_path))) == 1
    assert (tmp_path / "run.json.unreadable").read_text() == content
    assert "run.json cannot be read and is left out" in caplog.text


def test_a_record_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "run.json.tmp").mkdir()
    with (
        pytest.raises(ConfigError, match="OUTPUT_DIR .* cannot write run.json"),
        record_run(str(tmp_path), []),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["/bin/ssimkd", "eval", "KEY", "a b"], "ssimkd eval KEY 'a b'"),
        (["/x/ssimkd/__main__.py", "train"], "ssimkd train"),
        (["train_net.py", "--eval-only"], "python train_net.py --eval-only"),
    ],
)
def test_the_command_is_what_a_user_types(words, command):
    assert command_line(words) == command


@pytest.mark.parametrize("written", [None, "metrics.json", "model_0000009.pth"])
def test_a_command_that_trains_nothing_leaves_the_config_of_the_run(tmp_path, written):
    config = tmp_path / "config.yaml"
    config.write_text("of the run")
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(ConfigError), keep_config(str(tmp_path)):
        config.write_text("of the command")
        if written:
            (tmp_path / written).touch()
        raise ConfigError("a typo")
    assert config.read_text() == ("of the command" if written else "of the run")


def test_an_evaluation_during_a_training_leaves_config_and_record_whole(tmp_path):
    folder, config = str(tmp_path), tmp_path / "config.yaml"
    config.write_text("of the run")
    (tmp_path / "model_0000009.pth").touch()
    with record_run(folder, ["val"]):
        with keep_config(folder, evaluates=True), record_run(folder, ["test"], evaluates=True):
            config.write_text("of the evaluation")
            (tmp_path / "metrics.json").touch()  # by the training
        assert config.read_text() == "of the run"
    keys = ("test", "outcome", "evaluates", "processes")
    assert [tuple(entry[key] for key in keys) for entry in read_record(folder)] == [
        (["val"], "finished", False, 1),
        (["test"], "finished", True, 1),
    ]


def test_without_checkpoints_the_config_is_that_of_the_last_evaluation(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("of the first")
    with keep_config(str(tmp_path)):
        config.write_text("of the second")
    assert config.read_text() == "of the second"


def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    """A copy that was installed inside another repository has none."""
    for words in (["init"], ["config", "user.name", "a"], ["config", "user.email", "a@b"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(["git", "commit", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    monkeypatch.setattr(run_record, "__file__", str(tmp_path / "run_record.py"))
    (tmp_path / "run_record.py").touch()
    assert run_record.commit() is None
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    subprocess.run(["git", "commit", "-m", "x"], cwd=tmp_path, check=True)
    assert re.fullmatch("[0-9a-f]{12}", run_record.commit())
