"""Importing ssimkd, and each of its modules, changes nothing in another package."""

import subprocess
import sys

# Imports the modules that it is given, and then all of ssimkd; prints what has changed meanwhile.
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


if sys.argv[1:]:
    import_all(sys.argv[1:])
    modules, before = set(sys.modules), snapshot()
    import_all(own_modules())
    after = snapshot()
    for key in {**before, **after}:
        known = key in before or key[0] in modules
        if known and before.get(key) != after.get(key):
            print(key)
else:
    import_all(own_modules())
    print(*(name for name in sys.modules if name.split(".")[0] not in ("ssimkd", "__main__")))
"""


def python(*words):
    command = [sys.executable, "-c", SCRIPT, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_it_changes_no_other_package():
    others = python().split()
    assert {"torch", "detectron2.engine.defaults", "yaml", "pycocotools.coco"} <= set(others)
    assert python(*others) == ""
