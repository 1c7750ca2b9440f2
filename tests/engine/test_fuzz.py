"""Random overrides are accepted, or end in an error of one line.

The seeds are fixed, so that a failure can be repeated. `make soak` runs many more.
"""

import random

import pytest
from conftest import shapes_cfg
from detectron2.config import CfgNode
from ssimkd.engine.arguments import check_config, load_arguments
from ssimkd.errors import exit_in_one_line
from ssimkd_cli import parse

VALUES = [
    "0", "-1", "1", "2.5", "1e400", "-0.0", "nan", "inf", "None", "True", "''", "x", "()", "(1,)",
    "[]", "[[]]", "{}", "{'a': 1}", "('p2',)", "['p3', 'p3']", "(1e9, -1e9)", "9" * 30, "3j",
    "../..", "a b", "\u00fc\u2603", "[None]", "b'x'", "1" * 400, "${a}", "(", "\\", "\n", "%s", "*",
]  # fmt: skip


def keys_of(node, prefix=""):
    for name, value in node.items():
        yield from keys_of(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else ()
        yield prefix + name


def refused(action, *args):
    """Whether an action ends in an error of one line; any other exception is a failure."""
    try:
        with exit_in_one_line():
            action(*args)
    except SystemExit as end:
        assert end.code.startswith("error: ") and len(end.code.splitlines()) == 1, args
        return True
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}: {args}") from error
    return False


def load(*words):
    args = parse("train", words)
    check_config(load_arguments(args), args)


def fuzz_yaml(rng, rounds):
    keys = list(keys_of(shapes_cfg("ssimkd")))
    own = [key for key in keys if ".DISTILL." in key or key.startswith(("DATASETS", "DATALOADER"))]
    outcomes = set()
    for _ in range(rounds):
        words = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            key = rng.choice(own if rng.random() < 0.7 else keys)
            if rng.random() < 0.1:
                key = key[: rng.randrange(len(key))] + rng.choice(["", "X", ".", ".."])
            words += [key, rng.choice(VALUES)]
        words = words[: len(words) - (rng.random() < 0.03)]
        outcomes.add(refused(load, "--config-file", "configs/shapes/ssimkd.yaml", *words))
    assert outcomes == {True, False}


@pytest.fixture(autouse=True)
def data(few_shapes, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)


def test_overrides_of_a_yaml_config():
    fuzz_yaml(random.Random(0), 80)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_more(seed):
    fuzz_yaml(random.Random(seed), 3000)
