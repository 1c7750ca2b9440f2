"""What a resumed run may change: settings with a warning, teachers not at all."""

import pytest
from ssimkd import ConfigError
from ssimkd.checkpoint.same_run import check_same_run, flatten
from torch import nn


def run_of(settings=(), **teachers):
    """A run with settings; the teachers are keys -> the SHA-256 of their files."""
    found = {key: {"file": f"{digest}.pth", "sha256": digest} for key, digest in teachers.items()}
    return {"settings": dict(settings), "teachers": found}


def test_settings_that_differ_are_one_warning(caplog):
    old = run_of({"SOLVER.BASE_LR": "0.1", "INPUT.FORMAT": "BGR", "GONE": "1"})
    check_same_run(old, old)
    assert not caplog.messages
    check_same_run(old, run_of({"SOLVER.BASE_LR": "0.2", "INPUT.FORMAT": "BGR", "NEW": "2"}))
    assert caplog.messages == [
        "--resume: these settings have changed: GONE was 1 and is now not set; "
        "NEW was not set and is now 2; SOLVER.BASE_LR was 0.1 and is now 0.2"
    ]


def test_a_teacher_may_stand_under_another_key_or_come_and_go():
    check_same_run(run_of(TEACHER="a"), run_of(TEACHERS="a"))
    check_same_run(run_of(), run_of(TEACHER="a"))
    check_same_run(run_of(TEACHER="a"), run_of())


@pytest.mark.parametrize("new", [{"TEACHER": "b"}, {"TEACHER": "a", "B": "b"}])
def test_other_teachers_are_an_error(new):
    with pytest.raises(ConfigError, match=r"its teachers were a.pth \(SHA-256 a...\) and are now"):
        check_same_run(run_of(TEACHER="a"), run_of(**new))
    with pytest.raises(ConfigError, match="is another run's"):
        check_same_run(run_of(**new), run_of(TEACHER="a"))


def test_settings_are_texts_that_are_the_same_in_every_process():
    settings = {"a": {"b": [1, 2]}, "c": [{"d": nn.Linear}, 3], "e": object(), "f": {}}
    assert dict(flatten(settings)) == {
        "a.b": "[1, 2]", "c.0.d": "Linear", "c.1": "3", "e": "<object object>", "f": "{}"
    }  # fmt: skip
