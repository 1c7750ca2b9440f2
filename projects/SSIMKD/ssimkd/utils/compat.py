"""Where Detectron2's versions differ from each other or from today's libraries."""

import importlib.resources
import sys
import types
from typing import Any

import torch.distributed as dist
from detectron2.engine import defaults
from detectron2.utils import comm
from torch import nn

try:
    from detectron2 import model_zoo
except ModuleNotFoundError as error:
    # The model zoo (v0.5 to main) imports pkg_resources for `resource_filename` alone, but
    # setuptools 82 has removed that module. A stand-in takes its place during this import.
    if error.name != "pkg_resources":
        raise
    stand_in: Any = types.ModuleType("pkg_resources")
    stand_in.resource_filename = lambda package, name: str(
        importlib.resources.files(package) / name
    )
    sys.modules["pkg_resources"] = stand_in
    try:
        from detectron2 import model_zoo  # noqa: F401
    finally:
        del sys.modules["pkg_resources"]

try:
    from detectron2.modeling.meta_arch.fcos import FCOS
except ImportError:  # v0.5
    FCOS = None


def has_compiled_ops() -> bool:
    """Whether Detectron2's C++ extension is installed. The fast COCO evaluation needs it."""
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return not _C.__file__.endswith(".py")  # tools/build_detectron2.py writes a .py in its place.


def create_local_process_group(size: int) -> None:
    """Tells Detectron2 that each machine has `size` processes."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
    else:  # v0.5
        comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(size)


def create_ddp_model(model: nn.Module, **kwargs) -> nn.Module:
    """Calls Detectron2's function with the device that the model is on.

    Detectron2 (v0.5 to main) would take the GPU whose number is the process's local rank. That is
    wrong on a CPU, and where each process sees only its own GPU, which then has number 0.
    """
    device = next(model.parameters()).device
    kwargs.setdefault("device_ids", [device.index] if device.type == "cuda" else None)
    return defaults.create_ddp_model(model, **kwargs)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
