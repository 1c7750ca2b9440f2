"""Where Detectron2's versions differ from each other or from today's libraries."""

import importlib.resources
import sys
import types


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
