"""Checkpoints from elsewhere: what they hold is read, what they would run is not."""

import collections
import functools
import hashlib
import http.server
import io
import os
import pickle
import re
import struct
import threading
import zipfile

import convert_torchvision
import numpy as np
import pytest
import torch
from conftest import shapes_cfg
from detectron2.modeling import build_model
from ssimkd import ConfigError
from ssimkd.checkpoint.export import read_weights
from ssimkd.checkpoint.reader import (
    check_download,
    multiarray,
    numeric,
    read_checkpoint,
    trust_checkpoints,
)
from ssimkd.checkpoint.strict import StrictCheckpointer, load_teacher
from ssimkd.commands import export as export_student
from ssimkd.commands import train as train_net


class Attack:
    """Reading it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def untrusted():
    yield
    trust_checkpoints(False)


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
    "tensor": torch.arange(4.0),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "plain": [1, 2.5, "text", b"bytes", None, True, (1, 2), {"a": {3}}, complex(1, 2)],
    "ordered": collections.OrderedDict(a=1),
}


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


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_of_arrays_and_tensors_is_read(tmp_path, protocol):
    assert_same(read_checkpoint(write(tmp_path / "x.pkl", HARMLESS, protocol)), HARMLESS)


@pytest.mark.parametrize("name", ["x.pth", "legacy.pth"])
def test_a_pth_of_arrays_scalars_and_tensors_is_read(tmp_path, name):
    """Trainers write NumPy scalars, which torch's own restricted reader refuses."""
    assert_same(read_checkpoint(write(tmp_path / name, HARMLESS)), HARMLESS)


@pytest.mark.parametrize(
    "old, new", [(b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")]
)
def test_files_of_either_numpy_are_read(tmp_path, old, new):
    content = pickle.dumps({"a": np.arange(3, dtype=">i2"), "b": np.float32(2)}, 2).replace(
        old, new
    )
    assert new in content
    (tmp_path / "x.pkl").write_bytes(content)
    found = read_checkpoint(str(tmp_path / "x.pkl"))
    assert found["a"].tolist() == [0, 1, 2] and found["b"] == 2


@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "legacy.pth", "x.pyth"])
def test_a_file_that_would_run_a_command_does_not(tmp_path, name):
    path = write(tmp_path / name, {"model": {"a": torch.ones(1), "b": Attack(tmp_path / "ran")}})
    assert "mkdir" in str(zipped(path) if name in ("x.pth", "x.pyth") else open(path, "rb").read())
    for read in (read_checkpoint, read_weights, StrictCheckpointer(torch.nn.Linear(1, 1)).load):
        with pytest.raises(
            ConfigError, match=r"it names \w+\.mkdir, .* --trust-checkpoint"
        ) as error:
            read(path)
        assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def zipped(path):
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


def test_a_pickle_inside_a_tensors_storage_does_not_run(tmp_path):
    """A tensor in a pickle holds a torch file, which is read by the same rules."""
    inner = io.BytesIO()
    torch.save(Attack(tmp_path / "ran"), inner)

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    path = write(tmp_path / "x.pkl", {"model": Storage()})
    with pytest.raises(ConfigError, match=r"it names \w+\.mkdir"):
        read_checkpoint(path)
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
        ("ssimkd.checkpoint.reader", "trust_checkpoints"),
    ],
)
def test_nothing_else_can_be_named(tmp_path, module, name):
    # opcodes of protocol 4: two strings, STACK_GLOBAL, empty tuple, call, stop
    words = b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, name))
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + words + b"\x93)R.")
    with pytest.raises(ConfigError, match=re.escape(f"it names {module}.{name},")):
        read_checkpoint(str(tmp_path / "x.pkl"))


def test_a_file_cannot_change_a_function_for_later_files(tmp_path):
    """GLOBAL, then BUILD with a state that is a dict: an update of the function's `__dict__`."""
    program = b"ctorch._utils\n_rebuild_tensor_v2\n}(S'marked'\nI1\nub."
    (tmp_path / "x.pkl").write_bytes(program)
    with pytest.raises(ConfigError):
        read_checkpoint(str(tmp_path / "x.pkl"))
    assert not hasattr(torch._utils._rebuild_tensor_v2, "marked")


class Call:
    """Reading it calls a function, and sets the state of what comes back."""

    def __init__(self, function, *args, state=None):
        self.result = (function, args, state) if state else (function, args)

    def __reduce__(self):
        return self.result


ADDRESS = bytearray(struct.pack("P", id(os.system)))
F8 = np.dtype("f8")
OBJECTS = Call(np.dtype, "O", False, True)
HIDDEN = Call(  # a structure with objects whose flags say that it has none
    np.dtype, "V8", False, True, state=(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
)


@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "legacy.pth"])
@pytest.mark.parametrize(
    "forged",
    [
        Call(np.ndarray, (1,), OBJECTS, ADDRESS),
        Call(np.ndarray, (1,), "O", ADDRESS),
        Call(np.ndarray, (100,), "i8"),  # memory as it is
        Call(numeric._frombuffer, ADDRESS, OBJECTS, (1,), "C"),
        Call(numeric._frombuffer, ADDRESS, HIDDEN, (1,), "C"),
        Call(multiarray.scalar, OBJECTS, bytes(ADDRESS)),
        Call(multiarray.scalar, HIDDEN, bytes(ADDRESS)),
        *(
            Call(
                *(multiarray._reconstruct, np.ndarray, (0,), b"b"),
                state=(1, (1,), kind, False, content),
            )
            for kind in (OBJECTS, HIDDEN)
            for content in (bytes(ADDRESS), [1])
        ),
        Call(multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (9,), F8, False, b"8" * 8)),
    ],
)
def test_no_object_is_made_of_bytes(tmp_path, name, forged):
    """Eight bytes taken for an object's address would be any function of the process."""
    with pytest.raises(ConfigError, match="cannot be read"):
        read_checkpoint(write(tmp_path / name, {"model": forged}))


def test_a_plain_pickle_with_another_name_is_named_too(tmp_path):
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"model": Attack(tmp_path / "ran")}, 4))
    with pytest.raises(ConfigError, match=r"it names \w+\.mkdir"):
        read_checkpoint(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "legacy.pth"])
def test_a_user_who_insists_may_run_it(tmp_path, name, untrusted):
    path = write(tmp_path / name, {"a": Attack(tmp_path / "ran")})
    trust_checkpoints(True)
    read_checkpoint(path)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize(
    "command, words",
    [
        (
            train_net.main,
            "--config-file configs/shapes/vanilla.yaml --eval-only {flag} MODEL.WEIGHTS {file} "
            "OUTPUT_DIR {out}",
        ),
        (
            export_student.main,
            "--config-file configs/shapes/vanilla.yaml --weights {file} --out {out} {flag}",
        ),
        (convert_torchvision.main, "resnet18 --weights {file} --out {out}/x.pth {flag}"),
    ],
)
def test_every_command_reads_so(tmp_path, few_shapes, command, words, monkeypatch, untrusted):
    """The evil file is no fitting checkpoint either: with the flag it runs and is then refused."""
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)
    path = write(tmp_path / "x.pkl", {"model": {"a": Attack(tmp_path / "ran")}, "__author__": "me"})
    for flag in ("", "--trust-checkpoint"):
        given = words.format(file=path, out=tmp_path / "out", flag=flag).split()
        monkeypatch.setattr("sys.argv", ["command", *given])
        with pytest.raises(SystemExit, match="^error: .*") as end:
            command()
        assert ("it names" in end.value.code) is (flag == "")
        assert (tmp_path / "ran").exists() is (flag != "")


def test_a_teacher_is_read_so(tmp_path):
    path = write(tmp_path / "x.pkl", {"model": Attack(tmp_path / "ran"), "__author__": "me"})
    with pytest.raises(ConfigError, match=r"TEACHER.WEIGHTS: .*x.pkl is not read: it names"):
        load_teacher(build_model(shapes_cfg("teacher")), path)
    assert not (tmp_path / "ran").exists()


def test_a_resumed_checkpoint_is_read_so(tmp_path):
    write(tmp_path / "model.pth", {"model": {}, "trainer": Attack(tmp_path / "ran")})
    (tmp_path / "last_checkpoint").write_text("model.pth")
    with pytest.raises(ConfigError, match="model.pth is not read: it names"):
        StrictCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).resume_or_load("", resume=True)
    assert not (tmp_path / "ran").exists()


def test_pycls_files_are_read(tmp_path):
    linear = torch.nn.Linear(2, 3)
    path = write(tmp_path / "x.pyth", {"model_state": linear.state_dict(), "epoch": np.float64(3)})
    model = torch.nn.Linear(2, 3)
    StrictCheckpointer(model).load(path)
    assert torch.equal(model.weight, linear.weight) and torch.equal(model.bias, linear.bias)


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_that_leaves_random_values(tmp_path, whole):
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 3), "head": torch.nn.Linear(3, 4)})
    state = model.state_dict()

    def load(**changes):
        path = write(tmp_path / "x.pth", {**state, **changes})
        StrictCheckpointer(model, whole=whole).load(path)

    load()
    other_head = {"head.weight": torch.zeros(9, 3), "head.bias": torch.zeros(9)}
    if whole:
        with pytest.raises(ConfigError, match=r"head.weight is \(9, 3\) instead of \(4, 3\)"):
            load(**other_head)
    else:
        load(**other_head)
    with pytest.raises(ConfigError, match="backbone.bias is .1,. instead of .3,."):
        load(**{"backbone.bias": torch.zeros(1)})
    path = write(tmp_path / "x.pth", {"nothing": torch.zeros(1)})
    with pytest.raises(ConfigError, match="x.pth .*backbone.weight is missing"):
        StrictCheckpointer(model, whole=whole).load(path)


CONTENT = b"the content of a checkpoint"
SHA, MD5 = (hashlib.new(kind, CONTENT).hexdigest() for kind in ("sha256", "md5"))


@pytest.mark.parametrize(
    "name, said",
    [
        (f"resnet50-{SHA[:8]}.pth", "INFO resnet50-"),
        (f"resnet50-{SHA}.pth", "INFO resnet50-"),
        ("resnet50-0676ba61.pth", "refused"),
        ("resnet50-20210101.pth", "WARNING resnet50-20210101.pth is not verified"),  # a date
        (f"model_final_{SHA[:6]}.pkl", "INFO model_final_"),
        (f"model_final_{MD5[:6]}.pkl", "INFO model_final_"),
        ("model_final_f10217.pkl", "WARNING model_final_f10217.pkl is not verified: f10217 in"),
        ("R-50.pkl", ""),
        ("model_final.pth", ""),
    ],
)
def test_a_download_is_compared_with_its_name(tmp_path, caplog, name, said):
    caplog.set_level("INFO")
    (tmp_path / "file").write_bytes(CONTENT)
    address = f"http://example/{name}"
    if said == "refused":
        message = f"{address} is not what its name says: its sha256 begins with {SHA[:8]}; delete"
        with pytest.raises(ConfigError, match=message):
            check_download(address, str(tmp_path / "file"))
        return
    check_download(address, str(tmp_path / "file"))
    found = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    assert (found[0].startswith(said) and len(found) == 1) if said else not found


def test_a_changed_download_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    linear = torch.nn.Linear(1, 1)
    good = write(tmp_path / "good.pth", linear.state_dict())
    digest = hashlib.sha256(open(good, "rb").read()).hexdigest()[:8]
    os.rename(good, tmp_path / f"a-{digest}.pth")
    write(tmp_path / f"b-{digest}.pth", {**linear.state_dict(), "more": torch.ones(1)})
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        StrictCheckpointer(torch.nn.Linear(1, 1)).load(f"{address}/a-{digest}.pth")
        with pytest.raises(ConfigError, match=f"/b-{digest}.pth is not what its name says"):
            StrictCheckpointer(torch.nn.Linear(1, 1)).load(f"{address}/b-{digest}.pth")
        with pytest.raises(ConfigError, match=f"cannot fetch {address}/no.pth"):
            StrictCheckpointer(torch.nn.Linear(1, 1)).load(f"{address}/no.pth")
    finally:
        server.shutdown()
