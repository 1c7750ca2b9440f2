"""Where Detectron2's versions differ from each other or from today's libraries."""

import importlib.resources
import sys
import types

import torch.distributed as dist
from detectron2.engine import defaults
from detectron2.utils import comm
from torch import nn


def _import_model_zoo():
    """Imports detectron2.model_zoo where setuptools no longer brings pkg_resources.

    Upstream (v0.5 to main) imports pkg_resources there, for `resource_filename` alone;
    setuptools 82 removed the module. A stand-in is shown to that one import and taken away again.
    """
    try:
        from detectron2 import model_zoo
    except ModuleNotFoundError as error:
        if error.name != "pkg_resources":
            raise
        stand_in = types.ModuleType("pkg_resources")
        stand_in.resource_filename = lambda package, name: str(  # type: ignore[attr-defined]
            importlib.resources.files(package) / name
        )
        sys.modules["pkg_resources"] = stand_in
        try:
            from detectron2 import model_zoo
        finally:
            del sys.modules["pkg_resources"]
    return model_zoo


model_zoo = _import_model_zoo()

try:
    from detectron2.modeling.meta_arch.fcos import FCOS
except ImportError:  # v0.5
    FCOS = None


def has_compiled_ops() -> bool:
    """Whether Detectron2's C++ extension is there: v0.5's fast COCO evaluation does not ask."""
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return not _C.__file__.endswith(".py")  # tools/build_detectron2.py puts a stand-in there


def create_local_process_group(size: int) -> None:
    """Tells Detectron2 that each machine has `size` processes; v0.5 has no function for it."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
    else:
        comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(size)


def create_ddp_model(model: nn.Module, **kwargs) -> nn.Module:
    """Detectron2's, with the device that the model is on.

    Upstream (v0.5 to main) names the GPU of the process's local rank: there is none on a CPU, and
    it has number 0 where a process sees no GPU but its own.
    """
    device = next(model.parameters()).device
    kwargs.setdefault("device_ids", [device.index] if device.type == "cuda" else None)
    return defaults.create_ddp_model(model, **kwargs)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
