"""`run.json` says how a run was made."""

import pytest
from ssimkd import ConfigError
from ssimkd.engine.run_record import command_line, only_evaluates, read_record, record_run


@pytest.mark.parametrize("content", ['[{"comm', "3"])
def test_an_unreadable_record_is_renamed_and_a_new_one_begins(tmp_path, caplog, content):
    (tmp_path / "run.json").write_text(content)
    with record_run(str(tmp_path)):
        assert len(read_record(str(tmp_path))) == 1
    assert (tmp_path / "run.json.unreadable").read_text() == content
    assert "run.json cannot be read and is left out" in caplog.text


def test_a_record_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "run.json.tmp").mkdir()
    with (
        pytest.raises(ConfigError, match="OUTPUT_DIR .* cannot write run.json"),
        record_run(str(tmp_path)),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "command", "evaluates"),
    [
        (["/bin/ssimkd", "eval", "KEY", "a b"], "ssimkd eval KEY 'a b'", True),
        (["/x/ssimkd/__main__.py", "train"], "ssimkd train", False),
        (["train_net.py", "--eval-only"], "python train_net.py --eval-only", True),
    ],
)
def test_the_command_is_what_a_user_types(words, command, evaluates):
    assert command_line(words) == command
    assert only_evaluates({"command": command}) == evaluates
