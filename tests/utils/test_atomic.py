"""A file is written completely or not at all."""

import os

import pytest
from ssimkd.utils.atomic import atomic_write


def test_a_failure_leaves_the_earlier_file(tmp_path):
    path = str(tmp_path / "results.json")
    with atomic_write(path, "w") as f:
        f.write("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "w") as f:
        f.write("new")
        raise KeyboardInterrupt
    assert open(path).read() == "old" and os.listdir(tmp_path) == ["results.json"]
