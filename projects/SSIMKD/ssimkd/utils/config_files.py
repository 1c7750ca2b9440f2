"""Finding and reading config files: `.yaml` into a CfgNode, `.py` into a DictConfig."""

import io
import os
import re
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any, List, Sequence, Union

import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssimkd.config import add_ssimkd_config
from ssimkd.errors import ConfigError, as_config_error, one_line

from .compat import model_zoo

PACKAGE = Path(__file__).resolve().parents[1]
# This project's configs: inside an installed package, or in a checkout of the repository.
FOLDERS = (PACKAGE / "configs", PACKAGE.parents[2] / "configs")
SUFFIXES = (".yaml", ".py")

# Detectron2's RetinaNet configs hold the sizes of their anchors as this code. The value of the
# code is read in its place.
ANCHORS = re.compile(
    r'!!python/object/apply:eval \["\[\[x, x \* 2\*\*\(1\.0/3\), x \* 2\*\*\(2\.0/3\) \] '
    r'for x in \[32, 64, 128, 256, 512 \]\]"\]'
)
ANCHOR_SIZES = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in [32, 64, 128, 256, 512]]

# yacs raises these for a key or value that does not fit a config.
WRONG_SETTING = (AssertionError, AttributeError, KeyError, TypeError, ValueError)
LOADER = "detectron2._cfg_loader"
INTEGER_FOR_FLOAT = "Type mismatch (<class 'float'> vs. <class 'int'>)"


def find_config(name: Union[str, Path]) -> str:
    """Local path of a config.

    Args:
        name (str or Path): a file; or the name of a config of this project or of Detectron2's zoo,
            such as "ssimkd_R50" or "COCO-Detection/retinanet_R_50_FPN_1x". The suffix and a leading
            "configs/" can be left out.

    Raises:
        ConfigError: there is none of this name.
    """
    name = os.fspath(name)
    if name and PathManager.isfile(name):
        return PathManager.get_local_path(name)
    return find_named(name)


def find_named(name: str) -> str:
    """As :func:`find_config`, but a file of the user's own is not looked for."""
    inside = name[len("configs/") :] if name.startswith("configs/") else name
    paths = [str(folder / (inside + suffix)) for folder in FOLDERS for suffix in ("", *SUFFIXES)]
    for suffix in ("", *SUFFIXES):
        with suppress(RuntimeError):  # The zoo has no such config.
            paths.append(model_zoo.get_config_file(name + suffix))
    for path in paths:
        if path.endswith(SUFFIXES) and os.path.isfile(path):
            return path
    raise ConfigError(
        f"{name!r} is neither a .yaml or .py file, nor the name of a config of this project or of "
        "Detectron2's zoo"
    )


def find_shipped(path: str) -> str:
    """The project's own file for a path such as "configs/shapes/teacher.pth" that does not exist.

    Any other path is returned unchanged.
    """
    if os.path.exists(path) or not path.startswith("configs/"):
        return path
    files = [folder.parent / path for folder in FOLDERS]
    return next((str(file) for file in files if file.is_file()), path)


def find_weights(weights: str, path: str) -> str:
    """Where the checkpoint is that a `.yaml` names, in the current folder or beside the `.yaml`.

    The `student.pth` of an exported student is the one beside its `.yaml`.
    """
    beside = os.path.join(os.path.dirname(path), weights)
    if os.path.isfile(beside) and (weights == "student.pth" or not os.path.exists(weights)):
        return beside
    return find_shipped(weights)


def load_config(name: Union[str, Path], overrides: Sequence = ()) -> Union[CfgNode, DictConfig]:
    """Reads a config and applies overrides.

    Args:
        name (str): see :func:`find_config`.
        overrides (sequence): "KEY", value, ... for `.yaml`; "key=value", ... for `.py`.

    Returns:
        CfgNode or DictConfig: the former has this project's keys, too, and is not frozen. Its
        MODEL.WEIGHTS is the path that :func:`find_weights` finds.

    Raises:
        ConfigError: there is no such config, a `.yaml` is malformed or holds code, or an override
            does not apply, or a `.py` names a key of a config that does not exist. Other errors in
            the code of a `.py` are raised unchanged.
    """
    path = find_config(name)
    if path.endswith(".py"):
        cfg = apply_lazy_overrides(load_lazy(path), list(map(str, overrides)))
        return paths_as_text(cfg)
    if not path.endswith((".yaml", ".yml")):
        raise ConfigError(f"{path} must end in .yaml or .py")
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    merge_yaml(cfg, path)
    cfg.MODEL.WEIGHTS = find_weights(cfg.MODEL.WEIGHTS, path)
    merge_overrides(cfg, overrides)
    return cfg


def load_lazy(path: str) -> DictConfig:
    """Runs a `.py` config; raises ConfigError with its line where a key cannot be got or set."""
    try:
        return LazyConfig.load(path)
    except (OmegaConfBaseException, AttributeError, KeyError, TypeError) as error:
        place, frames = path, list(walk_tb(error.__traceback__))
        # Detectron2 runs a config without a module name, and its imports under this one
        own = [x[0].f_globals.get("__name__", LOADER).startswith(LOADER) for x in frames]
        if not (own[-1] or isinstance(error, OmegaConfBaseException)):
            raise  # it comes from a library, so its traceback is needed
        for (frame, line), is_own in zip(frames, own):
            if is_own:
                place = f"{frame.f_code.co_filename}, line {line}"
        raise ConfigError(f"{place}: {one_line(error)}") from error


def paths_as_text(node: Any) -> Any:
    """Replaces every pathlib.Path in a DictConfig or ListConfig by its text, in place."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, os.PathLike):
            node[key] = os.fspath(value)
        elif OmegaConf.is_config(value):
            paths_as_text(value)
    return node


def read_unchecked(path: str, overrides: Sequence, key: str) -> str:
    """A setting of a `.yaml` as text. Its other keys need not exist; "" if it cannot be read."""
    for i in reversed(range(0, len(overrides) - 1, 2)):
        if overrides[i] == key:
            return str(overrides[i + 1])
    cfg = get_cfg()
    with suppress(Exception):  # :func:`load_config` names what is wrong
        content = _YamlFile.load_yaml_with_base(path)
        for part in key.split(".")[:-1]:
            content, cfg = content.get(part, {}), cfg[part]
        found = str(content.get(key.split(".")[-1], cfg[key.split(".")[-1]]))
        return find_weights(found, path) if key == "MODEL.WEIGHTS" else found
    return ""


class _YamlFile(CfgNode):
    """Reads a YAML file and its `_BASE_` files, and replaces the code of ANCHORS by its value.

    `_BASE_` is a path from the folder of the file, as in Detectron2, or, where there is no such
    file, the name of a config of this project or of the zoo.
    """

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        with PathManager.open(filename, "r") as f:
            text = ANCHORS.sub(str(ANCHOR_SIZES), f.read())
        with suppress(yaml.YAMLError):  # fvcore reads the text again, and then says what is wrong
            content = yaml.safe_load(text)
            if isinstance(content, dict) and BASE_KEY in content:
                base, folder = content[BASE_KEY], os.path.dirname(filename)
                one, several = partial(find_base, folder=folder), isinstance(base, list)
                content[BASE_KEY] = [*map(one, base)] if several else one(base)
                text = yaml.safe_dump(content)
        file = io.StringIO(text)
        file.name = filename  # type: ignore[misc]  # PyYAML's errors name it.
        return file


def find_base(base: str, folder: str) -> str:
    """The path of this project's or the zoo's config for a `_BASE_` that is no file in `folder`."""
    if isinstance(base, str) and not PathManager.isfile(os.path.join(folder, base)):
        with suppress(ConfigError):
            return os.path.abspath(find_named(base))
    return base


def merge_yaml(cfg: CfgNode, path: str) -> None:
    """Merges a YAML file into a config, in place, without running code that it holds.

    Raises:
        ConfigError: it is malformed, holds code, or does not fit the config's keys and types.
    """
    try:
        content = CfgNode(_YamlFile.load_yaml_with_base(path, allow_unsafe=False))
    except yaml.MarkedYAMLError as error:
        problem = error.problem
        if isinstance(error, yaml.constructor.ConstructorError):
            problem = f"code in a .yaml is not run: {problem}; write its value, or use a .py config"
        mark: Any = error.problem_mark
        raise ConfigError(f"{mark.name}, line {mark.line + 1}: {problem}") from error
    except (AttributeError, TypeError) as error:  # It is empty, a list, or text.
        raise ConfigError(f"{path} holds no keys") from error
    except (AssertionError, OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    if "_target_" in content.get("model", ()):
        raise ConfigError(
            f"{path} is a LazyConfig, for LazyConfig.load alone: name the .py config of its run, "
            "and this student's checkpoint by --weights"
        )
    try:
        cfg.merge_from_other_cfg(content)
    except WRONG_SETTING as error:
        raise ConfigError(f"{path}: {one_line(error)}{hint(cfg, error)}") from error


def merge_overrides(cfg: CfgNode, overrides: Sequence) -> None:
    """Merges "KEY", value, ... into a config, in place. A key of a float also takes an integer."""
    for i in range(0, len(overrides), 2):
        override = [os.fspath(x) if isinstance(x, Path) else x for x in overrides[i : i + 2]]
        node: Any = cfg
        for part in str(override[0]).split("."):
            node = node.get(part) if isinstance(node, CfgNode) else None
        if isinstance(node, float) and re.fullmatch(r"[+-]?\d+", str(override[-1])):
            override[1] = float(override[1])
        try:
            cfg.merge_from_list(override)
        except WRONG_SETTING as error:
            said = " ".join(map(str, override))
            raise ConfigError(f"{said}: {one_line(error)}{hint(cfg, error, said)}") from error


def hint(cfg: CfgNode, error: Exception, said: str = "") -> str:
    """How to correct a key or value that yacs refuses; "" where that is not known.

    Args:
        cfg (CfgNode): into which a setting was merged.
        error (Exception): of yacs.
        said (str): the override; "" for a file, whose wrong key stands in the error.
    """
    text = str(error.args[0] if error.args else "")
    if INTEGER_FOR_FLOAT in text:
        return "; write it with a decimal point"
    alone = re.search(r"<class '(?:list|tuple)'> vs\. <class '(\w+)'>.* vs\. (\S+)\) for", text)
    if alone:
        items = alone[2].split(",")
        listed = str(items) if alone[1] == "str" else f"[{alone[2]}]"
        return "; write a list, " + (f'"{listed}"' if said else listed)
    if "Non-existent" not in text:
        return ""
    node, parts = cfg, (said.split(" ")[0] if said else text.split(": ")[-1]).split(".")
    for i, part in enumerate(parts):
        if part not in node:
            near = get_close_matches(part.upper(), map(str, node), n=1)
            return f"; did you mean {'.'.join([*parts[:i], *near])}?" if near else ""
        node = node[part]
        if not isinstance(node, CfgNode):
            break
    return ""


def apply_lazy_overrides(cfg: DictConfig, overrides: List[str]) -> DictConfig:
    """A copy of a LazyConfig with overrides "key=value".

    Raises:
        ConfigError: an override is malformed, or names a key that does not exist. Below a node with
            `_target_` any key is accepted, since the call checks its arguments.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: an override of a .py config is written key=value")
        parts = [] if key.startswith(("+", "~")) else key.split(".")
        node: Any = cfg
        called = False
        for part, inner in zip(parts, [*parts[1:], None]):
            called = called or "_target_" in node
            keys = list(map(str, range(len(node)) if OmegaConf.is_list(node) else node))
            below = OmegaConf.select(node, part) if part in keys else None
            found = OmegaConf.is_config(below) if inner else called or part in keys
            if not found:
                known, near = ", ".join(keys), get_close_matches(part, keys, n=1)
                meant = f"; did you mean {near[0]}?" if near and part not in keys else ""
                raise ConfigError(
                    f"{key}: there are the keys {known} (+{key} makes a new one){meant}"
                )
            node = below
    # Hydra's parser, OmegaConf and Detectron2 raise many types of errors for a wrong override.
    with as_config_error(" ".join(overrides), Exception):
        return LazyConfig.apply_overrides(cfg, overrides)
