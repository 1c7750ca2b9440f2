"""Modules of the user's own, which register a backbone, a data set or another part of a run."""

import importlib
import os
import sys
from typing import List, Sequence

from ssimkd.errors import ConfigError, one_line

IMPORTED: List[str] = []  # the modules that this process has imported here, in order


def import_user_code(names: Sequence[str], where: str = "--import") -> None:
    """Imports modules. They may stand in the current folder, as for `python -m`.

    Args:
        names (sequence[str]): such as "my_package.my_module".
        where (str): what names them, for the error.

    Raises:
        ConfigError: a module, or one that it imports, is missing. Other errors of its code are
            raised unchanged.
    """
    for name in names:
        if name in IMPORTED:
            continue
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{where}: {name} cannot be imported ({one_line(error)}); run the command in the "
                "folder that holds it, or add this folder to PYTHONPATH"
            ) from error
        IMPORTED.append(name)
