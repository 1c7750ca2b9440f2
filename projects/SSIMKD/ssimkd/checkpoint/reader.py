"""Reading checkpoint files, without running what they hold.

A pickle is a program: whoever wrote it decides what it calls. Here it may build tensors, NumPy
arrays and plain containers and nothing else, unless the user trusts it (`--trust-checkpoint`).
"""

import codecs
import functools
import hashlib
import importlib
import io
import logging
import math
import os
import pickle
import re
import types
from collections import OrderedDict
from typing import Any, Dict, List, Optional

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import Checkpointer

from ssimkd.errors import ConfigError, as_config_error, building, one_line

logger = logging.getLogger(__name__)
_CORE = "numpy._core" if hasattr(np, "_core") else "numpy.core"
multiarray: Any = importlib.import_module(f"{_CORE}.multiarray")
numeric: Any = importlib.import_module(f"{_CORE}.numeric")

TRUST = "--trust-checkpoint"
# torch.hub's convention: the first digits of the file's sha256 stand behind the last hyphen.
HUB_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth?$")
# Detectron2's zoo. It calls the digits a commit; its model_final_280758.pkl has another sha256.
ZOO_NAME = re.compile(r"model_final_([0-9a-f]{6})\.pkl$")


def _tensor_storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class _Dtype:
    """What a pickle gets for `numpy.dtype`: plain numbers and text.

    A real one could be turned into one of objects, whose bytes then are addresses in memory.
    """

    def __init__(self, code: str, *options: Any) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biufcSU" or not self.dtype.itemsize:
            raise pickle.UnpicklingError(f"arrays of type {code} are not read")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """What a pickle gets for `numpy.ndarray`: an empty array, to be filled once."""

    def __new__(cls) -> "_Array":
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if isinstance(content, str):  # of Python 2
            content = content.encode("latin1")
        if not isinstance(content, bytes) or min(shape, default=0) < 0 or self.size:
            raise pickle.UnpicklingError("an array is filled with something else than bytes")
        if math.prod(shape) * kind.dtype.itemsize != len(content):
            raise pickle.UnpicklingError(f"{len(content)} bytes are no array of shape {shape}")
        super().__setstate__((1, shape, kind.dtype, int(fortran), content))  # type: ignore[arg-type]


def _reconstruct(kind: Any, *options: Any) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError(f"{kind} is no kind of array")
    return _Array()


def _scalar(kind: _Dtype, content: Any) -> Any:
    return multiarray.scalar(kind.dtype, content)


def _frombuffer(content: Any, kind: _Dtype, *options: Any) -> np.ndarray:
    return numeric._frombuffer(bytes(content), kind.dtype, *options)


# What a pickle may name -> what it gets. NumPy 2 renamed its core; files of both are about.
ADMITTED: Dict[str, Any] = {
    "_codecs.encode": codecs.encode,  # how protocol 2 writes bytes
    "collections.OrderedDict": OrderedDict,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.storage._load_from_bytes": _tensor_storage,
}
for _kind in (set, frozenset, complex, bytearray):
    for _module in ("builtins", "__builtin__"):  # the latter in protocols of Python 2
        ADMITTED[f"{_module}.{_kind.__name__}"] = _kind
for _core in ("numpy.core", "numpy._core"):
    ADMITTED[f"{_core}.multiarray._reconstruct"] = _reconstruct
    ADMITTED[f"{_core}.multiarray.scalar"] = _scalar
    ADMITTED[f"{_core}.numeric._frombuffer"] = _frombuffer
# torch's own restricted reader admits tensors and containers; this is added to it.
NUMPY: List[Any] = [(value, name) for name, value in ADMITTED.items() if name.startswith("numpy")]

# Both readers' words for what they do not call.
NAMED = re.compile(r"GLOBAL (\S+) (was not an allowed global|whose module)")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = ADMITTED.get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not an allowed global")
        # A pickle may set attributes of what it gets: of a copy, where they can be set at all
        return functools.partial(found) if isinstance(found, types.FunctionType) else found


_trusted = False


def trust_checkpoints(trusted: bool) -> None:
    """Whether this process reads checkpoints with Python's own reader, which runs anything."""
    global _trusted
    _trusted = trusted


def read_checkpoint(path: str) -> Dict[str, Any]:
    """The content of a `.pkl` or `.pth` file, tensors on the CPU.

    Raises:
        ConfigError: it cannot be read, holds no mapping, or names what is not admitted; to be put
            after the file's name.
    """
    try:
        content = read_raw(path)
    except Exception as error:  # a pickle that is none can raise anything
        name = NAMED.search(str(error)) or _named_by_plain(path)
        if name:
            raise ConfigError(
                f"is not read: it names {name[1]}, which may run any code; {TRUST} reads it all "
                "the same, if you trust who wrote it"
            ) from error
        # torch's advice in its first line, to read it without restriction, would not help
        why = "it is no checkpoint" if "Weights only" in str(error) else one_line(error)
        raise ConfigError(f"cannot be read: {why}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"holds a {type(content).__name__} instead of tensors by name")
    return content


def read_raw(path: str, **options: Any) -> Any:
    """What a file holds, or any exception; the options are torch.load's."""
    if path.endswith(".pkl"):
        with open(path, "rb") as f:
            # latin1: Caffe2's were written by Python 2
            return (pickle.Unpickler if _trusted else _Unpickler)(f, encoding="latin1").load()
    with torch.serialization.safe_globals(NUMPY):
        return torch.load(path, map_location="cpu", weights_only=not _trusted, **options)


def _named_by_plain(path: str) -> Optional[re.Match]:
    """What a plain pickle would call that has not the name of one."""
    try:
        with open(path, "rb") as f:
            _Unpickler(f).load()
    except Exception as error:
        return NAMED.search(str(error))
    return None


class _Reader(Checkpointer):
    """Reads where Detectron2 calls its parent, hence for all but `.pkl` and `.pyth`."""

    def _load_file(self, f: str) -> Dict[str, Any]:
        return read_checkpoint(f)


class CheckpointReader(DetectionCheckpointer, _Reader):
    """Detectron2's checkpointer, which reads by :func:`read_checkpoint` and checks downloads."""

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """As Detectron2's.

        Raises:
            ConfigError: it cannot be fetched or read, or what it holds cannot be loaded.
        """
        if path and "://" in path:
            fetch(path.split("?")[0])
        with building(f"{path} cannot be loaded"), as_config_error(path, sep=" "):
            return super().load(path, *args, **kwargs)

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
    """Local path of a URL or path, downloaded if need be and checked.

    Raises:
        ConfigError: it cannot be had, or see :func:`check_download`.
    """
    with as_config_error(f"cannot fetch {address}", Exception):
        path = PathManager.get_local_path(address)
    if "://" in address:
        check_download(address, path)
    return path


def check_download(address: str, path: str) -> None:
    """Compares a file with the digits in its name, where there are some.

    Args:
        address (str): URL that it came from.
        path (str): where it lies.

    Raises:
        ConfigError: the name follows torch.hub's convention and the file differs. Detectron2's zoo
            does not say what its digits are, so a difference there is a warning.
    """
    name = os.path.basename(address)
    hub, zoo = HUB_NAME.search(name), ZOO_NAME.search(name)
    match: Optional[re.Match] = hub or zoo
    if match is None or not os.path.isfile(path):
        return
    with open(path, "rb") as f:
        content = f.read()
    digests = {kind: hashlib.new(kind, content).hexdigest() for kind in ("sha256", "md5")}
    kinds = [kind for kind, digest in digests.items() if digest.startswith(match[1])]
    if kinds:
        logger.info("%s is what its name says, by %s", name, kinds[0])
    elif hub and not match[1].isdigit():  # a date is no digest
        raise ConfigError(
            f"{address} is not what its name says: its sha256 begins with "
            f"{digests['sha256'][: len(match[1])]}; delete {path} to fetch it again"
        )
    else:
        logger.warning(
            "%s is not verified: %s in its name begins neither its sha256 (%s) nor its md5 (%s)",
            *(name, match[1], digests["sha256"], digests["md5"]),
        )
