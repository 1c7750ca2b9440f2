"""Checkpoints of other people: their tensors are read, and code in them is not run."""

import collections
import fractions
import functools
import hashlib
import http.server
import os
import pickle
import re
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from ssimkd import ConfigError
from ssimkd.checkpoint import reader
from ssimkd.checkpoint.coverage import load_detector_weights
from ssimkd.checkpoint.reader import multiarray, numeric, read_checkpoint, read_weights
from ssimkd.checkpoint.run_checkpointer import RunCheckpointer


class Attack:
    """Reading it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write(path, content, protocol=2):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=path.stem != "legacy")
    return str(path)


HARMLESS = {
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.ones((3, 2), np.int64)),
    "half": np.float16(1.5),
    "scalar": np.float64(2.5),
    "count": np.int64(7),
    "string": np.array(["a", "b"]),
    "plain": [1, 2.5, "text", b"bytes", None, True, (1, 2), {"a": {3: 4}}],
    "ordered": collections.OrderedDict(a=1),
}
TENSORS = {"tensor": torch.arange(4.0), "parameter": torch.nn.Parameter(torch.ones(2))}


def assert_same(found, expected):
    assert isinstance(found, type(expected))
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_of_arrays_is_read(tmp_path, protocol):
    assert_same(read_checkpoint(write(tmp_path / "x.pkl", HARMLESS, protocol)), HARMLESS)


@pytest.mark.parametrize("name", ["x.pth", "legacy.pth"])
def test_a_pth_of_arrays_scalars_and_tensors_is_read(tmp_path, name):
    """Trainers write NumPy scalars, which torch's own restricted reader refuses."""
    content = {**HARMLESS, **TENSORS}
    assert_same(read_checkpoint(write(tmp_path / name, content)), content)


@pytest.mark.parametrize("new", [b"numpy.core", b"numpy._core"])
def test_files_of_either_numpy_are_read(tmp_path, new):
    content = pickle.dumps({"a": np.arange(3, dtype=">i2"), "b": np.float32(2)}, 2)
    (tmp_path / "x.pkl").write_bytes(re.sub(rb"numpy\._?core", new, content))
    found = read_checkpoint(str(tmp_path / "x.pkl"))
    assert found["a"].tolist() == [0, 1, 2] and found["b"] == 2


@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "legacy.pth", "x.pyth"])
def test_a_file_that_would_run_a_command_does_not(tmp_path, name):
    path = write(tmp_path / name, {"model": {"a": np.ones(1), "b": Attack(tmp_path / "ran")}})
    message = r"it names \w+\.mkdir, which may run any code. If you trust its author"
    for read in (read_checkpoint, read_weights, RunCheckpointer(torch.nn.Linear(1, 1)).load):
        with pytest.raises(ConfigError, match=message) as error:
            read(path)
        assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("numpy", "ndarray.tofile"),
        ("numpy.testing", "runstring"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("collections", "OrderedDict.__init__"),
        ("torch.storage", "_load_from_bytes"),  # it reads a pickle inside a pickle
        ("ssimkd.checkpoint.reader", "read_file"),
    ],
)
def test_other_names_are_refused(tmp_path, module, name):
    # The opcodes of protocol 4 are: two strings, STACK_GLOBAL, empty tuple, call, stop.
    words = b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, name))
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + words + b"\x93)R.")
    with pytest.raises(ConfigError, match=re.escape(f"it names {module}.{name},")):
        read_checkpoint(str(tmp_path / "x.pkl"))


def test_a_file_cannot_change_a_function_for_later_files(tmp_path):
    """The program names a function and updates its `__dict__` (GLOBAL, BUILD)."""
    program = b"cnumpy.core.multiarray\nscalar\n}(S'marked'\nI1\nub."
    (tmp_path / "x.pkl").write_bytes(program)
    with pytest.raises(ConfigError):
        read_checkpoint(str(tmp_path / "x.pkl"))
    assert not hasattr(reader._scalar, "marked")


class Call:
    """Reading it calls a function, and sets the state of what comes back."""

    def __init__(self, function, *args, state=None):
        self.result = (function, args, state) if state else (function, args)

    def __reduce__(self):
        return self.result


ADDRESS = struct.pack("P", id(os.system))
F8 = np.dtype("f8")
OBJECTS = Call(np.dtype, "O", False, True)
HIDDEN = Call(  # A structure with objects, whose flags say that it has none.
    np.dtype, "V8", False, True, state=(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
)


@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "legacy.pth"])
@pytest.mark.parametrize(
    "forged",
    [
        Call(np.ndarray, (1,), OBJECTS, ADDRESS),
        Call(np.ndarray, (1,), "O", ADDRESS),
        Call(np.ndarray, (100,), "i8"),  # memory that is not initialised
        Call(numeric._frombuffer, ADDRESS, OBJECTS, (1,), "C"),
        Call(numeric._frombuffer, ADDRESS, HIDDEN, (1,), "C"),
        Call(multiarray.scalar, OBJECTS, ADDRESS),
        Call(multiarray.scalar, HIDDEN, ADDRESS),
        *(
            Call(
                *(multiarray._reconstruct, np.ndarray, (0,), b"b"),
                state=(1, (1,), kind, False, content),
            )
            for kind in (OBJECTS, HIDDEN)
            for content in (ADDRESS, [1])
        ),
        Call(multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (9,), F8, False, b"8" * 8)),
    ],
)
def test_bytes_cannot_become_objects(tmp_path, name, forged):
    """Eight bytes taken for an object's address would be any function of the process."""
    with pytest.raises(ConfigError, match="cannot be read"):
        read_checkpoint(write(tmp_path / name, {"model": forged}))


def test_the_error_names_a_command_that_converts_the_file(tmp_path):
    """For a file whose author the user trusts."""
    weights = {"a": np.ones(3, np.float32), "note": fractions.Fraction(1, 2)}
    path = write(tmp_path / "it's $y`.pkl", {"model": weights, "config": fractions.Fraction(3)})
    with pytest.raises(ConfigError, match="it names fractions.Fraction") as error:
        read_checkpoint(path)
    command = str(error.value).partition("convert it: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert_same(read_checkpoint(path[:-4] + "_weights.pth"), {"model": {"a": torch.ones(3)}})


def test_teachers_and_resumed_checkpoints_are_read_without_running_them(tmp_path):
    path = write(tmp_path / "x.pkl", {"model": Attack(tmp_path / "ran"), "__author__": "me"})
    with pytest.raises(ConfigError, match=r"TEACHER.WEIGHTS: .*x.pkl is not read: it names"):
        load_detector_weights(torch.nn.Linear(1, 1), path)
    write(tmp_path / "model.pth", {"model": {}, "trainer": Attack(tmp_path / "ran")})
    (tmp_path / "last_checkpoint").write_text("model.pth")
    with pytest.raises(ConfigError, match="model.pth is not read: it names"):
        RunCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).resume_or_load("", resume=True)
    assert not (tmp_path / "ran").exists()


def test_pycls_files_are_read(tmp_path):
    linear = torch.nn.Linear(2, 3)
    path = write(tmp_path / "x.pyth", {"model_state": linear.state_dict(), "epoch": np.float64(3)})
    model = torch.nn.Linear(2, 3)
    RunCheckpointer(model).load(path)
    assert torch.equal(model.weight, linear.weight) and torch.equal(model.bias, linear.bias)


def test_a_changed_download_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    linear = torch.nn.Linear(1, 1)
    good = write(tmp_path / "c-20210101.pth", linear.state_dict())  # The digits are a date.
    digest = hashlib.sha256(open(good, "rb").read()).hexdigest()[:8]
    os.link(good, tmp_path / f"a-{digest}.pth")
    write(tmp_path / f"b-{digest}.pth", {**linear.state_dict(), "more": torch.ones(1)})
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        load = RunCheckpointer(linear).load
        load(f"{address}/a-{digest}.pth"), load(f"{address}/c-20210101.pth")
        with pytest.raises(ConfigError, match=f"/b-{digest}.pth is not what its name says"):
            load(f"{address}/b-{digest}.pth")
        with pytest.raises(ConfigError, match=f"cannot fetch {address}/no.pth"):
            load(f"{address}/no.pth")
    finally:
        server.shutdown()
