"""What sets runs apart from a base, setting by setting."""

import os
import shlex
import tempfile
from typing import Any, Dict, List, Mapping

from detectron2.config import LazyConfig, get_cfg
from detectron2.engine import default_argument_parser
from omegaconf import DictConfig, OmegaConf

from ..config import add_ssimkd_config
from .run import Run

ABSENT = "-"


def flat(node: Any, prefix: str = "") -> Dict[str, str]:
    """A config as "A.B.C" -> its value in words; of a list of nodes as "A.0.B"."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, (list, tuple)) and any(isinstance(item, Mapping) for item in node):
        node = dict(enumerate(node))
    if not isinstance(node, Mapping) or not node:
        return {prefix: str(list(node) if isinstance(node, tuple) else node)}
    settings: Dict[str, str] = {}
    for key, value in node.items():
        settings.update(flat(value, f"{prefix}.{key}".lstrip(".")))
    return settings


def base_of(run: Run) -> Dict[str, str]:
    """What a run's settings are compared with.

    Returns:
        dict[str, str]: of a YAML run Detectron2's and this project's defaults; of a lazy run the
        file that its command names, without overrides; empty where that is not known.
    """
    if not run.lazy:
        cfg = get_cfg()
        add_ssimkd_config(cfg)
        return flat(cfg)
    if not run.record:
        return {}
    words = shlex.split(run.record[0]["command"])[2:]
    path = default_argument_parser().parse_args(words).config_file
    try:
        cfg = LazyConfig.load(path)
        with tempfile.TemporaryDirectory() as folder:  # as the run wrote its own
            written = os.path.join(folder, "config.yaml")
            LazyConfig.save(cfg, written)
            return flat(LazyConfig.load(written))
    except Exception:  # whatever a Python file that has moved since may raise
        return {}


def differences(runs: List[Run]) -> List[List[str]]:
    """Rows of a table: key, the first run's base, then every run's value; only where one differs.

    Args:
        runs (list[Run]): of one kind, YAML or lazy.
    """
    columns = [base_of(runs[0]), *(flat(run.cfg) for run in runs)]
    rows = []
    for key in sorted({key for column in columns for key in column}):
        values = [column.get(key, ABSENT) for column in columns]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return rows
