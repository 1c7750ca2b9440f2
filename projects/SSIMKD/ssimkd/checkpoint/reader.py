"""Reading checkpoint files without running code that they hold.

A pickle is a program: its author decides what it calls. A `.pth` file is read by torch's
`weights_only` reader, a `.pkl` file by the small reader below. Both build tensors, plain containers
and NumPy arrays of numbers, and refuse anything else.
"""

import codecs
import functools
import hashlib
import importlib
import math
import os
import pickle
import re
import types
from collections import OrderedDict
from typing import Any, Dict, List

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from ssimkd.errors import ConfigError, as_config_error, one_line

CORES = ("numpy._core", "numpy.core")  # NumPy 2 has renamed the latter to the former.
_CORE = CORES[0] if hasattr(np, "_core") else CORES[1]
multiarray: Any = importlib.import_module(f"{_CORE}.multiarray")
numeric: Any = importlib.import_module(f"{_CORE}.numeric")

# By torch.hub's convention a name ends in the first digits of the file's SHA-256, but a date does
# not count.
HUB_NAME = re.compile(r"-(?!20\d{6}\.)([0-9a-f]{8,64})\.pth?$")
# The messages of both readers about a function or class that they refuse to call.
NAMED = re.compile(r"GLOBAL (\S+) (was not an allowed global|whose module)")


class _Dtype:
    """Stands in for `numpy.dtype` while a file is read: a type of numbers or text.

    With a real dtype a file could turn bytes into an array of objects. NumPy would then take the
    bytes for addresses of objects in memory.
    """

    def __init__(self, code: str, *options: Any) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biufcSU" or not self.dtype.itemsize:
            raise pickle.UnpicklingError(f"arrays of type {code} are not read")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Stands in for `numpy.ndarray` while a file is read: an empty array that is filled once."""

    def __new__(cls) -> "_Array":
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if isinstance(content, str):  # written by Python 2
            content = content.encode("latin1")
        if not isinstance(content, bytes) or min(shape, default=0) < 0 or self.size:
            raise pickle.UnpicklingError("an array is filled with something else than bytes")
        if math.prod(shape) * kind.dtype.itemsize != len(content):
            raise pickle.UnpicklingError(
                f"{len(content)} bytes do not fit an array of shape {shape}"
            )
        super().__setstate__((1, shape, kind.dtype, int(fortran), content))  # type: ignore[arg-type]


def _reconstruct(kind: Any, *options: Any) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError(f"{kind} is not a kind of array")
    return _Array()


def _scalar(kind: _Dtype, content: Any) -> Any:
    return multiarray.scalar(kind.dtype, content)


def _frombuffer(content: Any, kind: _Dtype, *options: Any) -> np.ndarray:
    return numeric._frombuffer(bytes(content), kind.dtype, *options)


# A name that a file may hold -> the object that the file gets for it.
NUMPY: Dict[str, Any] = {"numpy.dtype": _Dtype, "numpy.ndarray": _Array}
for _core in CORES:
    NUMPY[f"{_core}.multiarray._reconstruct"] = _reconstruct
    NUMPY[f"{_core}.multiarray.scalar"] = _scalar
    NUMPY[f"{_core}.numeric._frombuffer"] = _frombuffer
ADMITTED = {**NUMPY, "_codecs.encode": codecs.encode, "collections.OrderedDict": OrderedDict}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = ADMITTED.get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not an allowed global")
        # A pickle can set attributes of a function, so each one gets a copy.
        return functools.partial(found) if isinstance(found, types.FunctionType) else found


def read_checkpoint(path: str) -> Dict[str, Any]:
    """The content of a `.pkl` or `.pth` file, tensors on the CPU.

    Raises:
        ConfigError: it cannot be read, does not hold a mapping, or names something that is not
            admitted. The caller puts the file's name before the message.
    """
    try:
        content = read_file(path)
    except Exception as error:  # A damaged pickle can raise anything.
        name = NAMED.search(str(error))
        if name:
            raise ConfigError(
                f"is not read: it names {name[1]}, which may run any code. If you trust its "
                f"author, convert it: {conversion_command(path)}"
            ) from error
        # torch's message would advise the user to read the file without restriction.
        why = "it is not a checkpoint" if "Weights only" in str(error) else one_line(error)
        raise ConfigError(f"cannot be read: {why}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"holds a {type(content).__name__} instead of tensors by name")
    return content


def read_file(path: str, **options: Any) -> Any:
    """The content of a file. It can raise any exception. The options are torch.load's."""
    if path.endswith(".pkl"):
        with open(path, "rb") as f:
            return _Unpickler(f, encoding="latin1").load()  # Python 2 wrote Caffe2's files.
    admitted: List[Any] = [(value, name) for name, value in NUMPY.items()]
    with torch.serialization.safe_globals(admitted):
        return torch.load(path, map_location="cpu", weights_only=True, **options)


def conversion_command(path: str) -> str:
    """A command that runs a file's code and writes its tensors to a file that can be read."""
    load = f"torch.load({path!r}, 'cpu', weights_only=False)"
    if path.endswith(".pkl"):
        load = f"pickle.load(open({path!r}, 'rb'), encoding='latin1')"
    target = os.path.splitext(path)[0] + "_weights.pth"
    code = (
        f"import pickle, torch; x = {load}; torch.save({{'model': {{k: torch.as_tensor(v) for k, v "
        f"in x.get('model', x).items() if hasattr(v, 'shape')}}}}, {target!r})"
    )
    return 'python -c "' + re.sub(r'([\\"$`])', r"\\\1", code) + '"'


class _Reader(Checkpointer):
    """The next class after DetectionCheckpointer in the order of CheckpointReader's parents.

    DetectionCheckpointer leaves all files but `.pkl` and `.pyth` to that class.
    """

    def _load_file(self, f: str) -> Dict[str, Any]:
        return read_checkpoint(f)


class CheckpointReader(DetectionCheckpointer, _Reader):
    """Detectron2's checkpointer with :func:`read_checkpoint`. Downloads are checked."""

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """Loads a checkpoint as Detectron2 does.

        Raises:
            ConfigError: it cannot be fetched or read, or its content cannot be loaded.
        """
        if path and "://" in path:
            fetch(path.split("?")[0])
        try:
            return super().load(path, *args, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"{path} {error}") from error
        except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"{path} cannot be loaded: {one_line(error)}") from error

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if not filename.endswith((".pkl", ".pyth")):
            return super()._load_file(filename)
        data = read_checkpoint(filename)
        if "model" in data and "__author__" in data:  # Detectron2's zoo
            return data
        if "model_state" in data:  # pycls
            data, author = data["model_state"], "pycls"
        else:
            data, author = data.get("blobs", data), "Caffe2"
        unused = ("_momentum", "num_batches_tracked")
        weights = {name: value for name, value in data.items() if not name.endswith(unused)}
        return {"model": weights, "__author__": author, "matching_heuristics": True}


def fetch(address: str) -> str:
    """Local path of a path or URL. A URL is downloaded once.

    Raises:
        ConfigError: it cannot be downloaded, or its SHA-256 is not the one in its name.
    """
    with as_config_error(f"cannot fetch {address}", Exception):
        path = PathManager.get_local_path(address)
    if "://" in address:
        check_hash(address, path)
    return path


def check_hash(address: str, path: str) -> None:
    """Raises ConfigError if a downloaded file does not have the SHA-256 in its address."""
    match = HUB_NAME.search(address)
    digest = sha256(path) if match else ""
    if match and not digest.startswith(match[1]):
        raise ConfigError(
            f"{address} is not what its name says: its SHA-256 begins with "
            f"{digest[: len(match[1])]}; delete {path} to fetch it again"
        )


def sha256(path: str) -> str:
    """SHA-256 of a file, as a hexadecimal number."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def read_weights(path: str) -> Dict[str, Any]:
    """The model's tensors in a checkpoint file (`.pth` or `.pkl`), by name."""

    class Reader(CheckpointReader):
        def _load_model(self, checkpoint):
            self.found = checkpoint["model"]
            self._convert_ndarray_to_tensor(self.found)

    reader = Reader(nn.Module())
    reader.load(path)
    return reader.found


def read_categories(path: str) -> List[Dict[str, Any]]:
    """The categories of the classes that a checkpoint was trained on; empty where it has none.

    Raises:
        ConfigError: the file cannot be read.
    """
    return categories_in(read_checkpoint(fetch(path)))


def categories_in(content: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The categories that the content of a checkpoint names; empty where it names none."""
    return list((content.get("run") or {}).get("categories", ()))
