"""Importing ssimkd, and each of its modules, changes nothing in another package."""

import importlib
import os
import pkgutil
import subprocess
import sys
from contextlib import suppress

import ssimkd

# Imports the modules that it is given, and then all of ssimkd; prints what the latter has changed.
SCRIPT = r"""
import importlib, logging, pkgutil, sys, types, warnings
import yaml


def import_all(names):
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:  # a module that only exists inside of another one
            pass


def is_code(value):
    kinds = (type, types.FunctionType, types.MethodType, staticmethod, classmethod, property)
    return isinstance(value, kinds)


def snapshot():
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "ssimkd" or not isinstance(module, types.ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if not is_code(value):
                continue
            found[module_name, name] = value
            if isinstance(value, type) and value.__module__ == module_name:
                members = [(k, v) for k, v in vars(value).items() if is_code(v)]
                found.update(((module_name, name, k), v) for k, v in members)
    loggers = {**logging.Logger.manager.loggerDict, "": logging.getLogger()}
    for name, logger in loggers.items():
        if isinstance(logger, logging.Logger):
            state = (logger.level, logger.propagate, *logger.filters, *logger.handlers)
            found["the logger", name] = state
    found["the warnings' filters"] = list(warnings.filters)
    for kind in ("yaml_constructors", "yaml_multi_constructors", "yaml_implicit_resolvers"):
        found["yaml.SafeLoader", kind] = dict(getattr(yaml.SafeLoader, kind))
    found["sys"] = (sys.excepthook, sys.stdout, sys.stderr, *sys.meta_path)
    return found


def own_modules():
    import ssimkd

    return [m.name for m in pkgutil.walk_packages(ssimkd.__path__, "ssimkd.")]


import_all(sys.argv[1:])
modules, before = set(sys.modules), snapshot()
import_all(own_modules())
after = snapshot()
for key in {**before, **after}:
    if (key in before or key[0] in modules) and before.get(key) != after.get(key):
        print(key)
"""


def imported_packages():
    """The modules that ssimkd, all of it, imports from other packages."""
    for module in pkgutil.walk_packages(ssimkd.__path__, "ssimkd."):
        with suppress(ImportError):  # a module that only exists inside of another one
            importlib.import_module(module.name)
    ours = ("ssimkd", "__main__", "pytest", "_pytest", "hypothesis")
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None) or ""
        if name.split(".")[0] not in ours and not file.startswith(os.path.dirname(__file__)):
            yield name


def test_importing_it_changes_no_other_package():
    others = list(imported_packages())
    assert {"torch", "detectron2.engine.defaults", "yaml", "pycocotools.coco"} <= set(others)
    command = [sys.executable, "-c", SCRIPT, *others]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
