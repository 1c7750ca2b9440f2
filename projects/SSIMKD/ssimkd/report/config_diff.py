"""What sets runs apart from a base, setting by setting."""

import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

from detectron2.config import LazyConfig, get_cfg
from omegaconf import DictConfig, OmegaConf

from ssimkd.checkpoint.same_run import flatten
from ssimkd.config import add_ssimkd_config
from ssimkd.errors import ConfigError
from ssimkd.utils.config_files import merge_yaml

from .run import Run

ABSENT = "-"


def flat(node: Any) -> Dict[str, str]:
    """A config as "A.B.C" -> its value in words; of a list of nodes as "A.0.B"."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    return dict(flatten(with_lists(node), words=str, split=(Mapping,)))


def with_lists(node: Any) -> Any:
    """Tuples as lists, at any depth: a config that was saved has either."""
    if isinstance(node, Mapping):
        return {key: with_lists(value) for key, value in node.items()}
    return [with_lists(item) for item in node] if isinstance(node, (list, tuple)) else node


def config_file(run: Run) -> str:
    """The config that the run's first command names; "" where that is not known."""
    if not run.record:
        return ""
    words = shlex.split(run.record[0]["command"])
    named = [b for a, b in zip(words, words[1:]) if a == "--config-file"]
    named += [word.partition("=")[2] for word in words if word.startswith("--config-file=")]
    return named[0] if named else ""


def yaml_base(run: Run) -> str:
    """The `_BASE_` of a YAML run's config file; "" where it has none or is not there."""
    path = config_file(run)
    if not os.path.isfile(path):
        return ""
    found = re.search(r"^_BASE_:\s*[\"']?([^\"'\s#]+)", Path(path).read_text(), re.MULTILINE)
    return os.path.join(os.path.dirname(path), found[1]) if found else ""


def base_of(run: Run) -> Tuple[str, Dict[str, str]]:
    """What a run's settings are compared with: its name, and its settings.

    Of a YAML run the `_BASE_` of its config file, or Detectron2's and this project's defaults; of
    a lazy run the file that its command names, without overrides; empty where that is not known.
    """
    if run.lazy:
        return "the file that the command names", lazy_base(config_file(run))
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    path = yaml_base(run)
    if path:
        try:
            merge_yaml(cfg, path)
            return path, flat(cfg)
        except (ConfigError, OSError):  # it has changed since
            cfg = get_cfg()
            add_ssimkd_config(cfg)
    return "the defaults of Detectron2 and SSIMKD", flat(cfg)


def lazy_base(path: str) -> Dict[str, str]:
    """The settings of a LazyConfig file without overrides."""
    try:
        cfg = LazyConfig.load(path)
        with tempfile.TemporaryDirectory() as folder:  # as the run wrote its own
            written = os.path.join(folder, "config.yaml")
            LazyConfig.save(cfg, written)
            return flat(LazyConfig.load(written))
    except Exception:  # whatever a Python file that has moved since may raise
        return {}


def unused_losses(runs: List[Run]) -> Tuple[str, ...]:
    """Starts of the keys of losses that none of some YAML runs has."""
    used = {str(name).upper() for run in runs for name in run.cfg.MODEL.DISTILL.LOSSES}
    for run in runs:
        for entry in run.cfg.MODEL.DISTILL.TEACHERS:
            used |= {str(name).upper() for name in entry.get("LOSSES", ())}
    nodes = {key for key, node in runs[0].cfg.MODEL.DISTILL.items() if isinstance(node, Mapping)}
    return tuple(f"MODEL.DISTILL.{name}." for name in nodes - used - {"TEACHER"})


def differences(runs: List[Run]) -> Tuple[str, List[List[str]]]:
    """Name of the first run's base, and rows of a table: key, the base's value, then every run's.

    A row is there where a value differs; those where runs differ from each other come first.

    Args:
        runs (list[Run]): of one kind, YAML or lazy.
    """
    name, base = base_of(runs[0])
    columns = [base, *(flat(run.cfg) for run in runs)]
    hidden = () if runs[0].lazy else unused_losses(runs)
    rows = []
    for key in sorted({key for column in columns for key in column}):
        values = [column.get(key, ABSENT) for column in columns]
        if len(set(values)) > 1 and not key.startswith(hidden):
            rows.append([key, *values])
    return name, sorted(rows, key=lambda row: len(set(row[2:])) == 1)
