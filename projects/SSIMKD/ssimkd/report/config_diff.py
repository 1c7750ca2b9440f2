"""The settings in which runs differ."""

from typing import List, Mapping, Tuple

from detectron2.config import CfgNode
from omegaconf import OmegaConf

from ssimkd.checkpoint.same_run import flatten

from .run import Run

ABSENT = "-"


def differences(runs: List[Run]) -> List[List[str]]:
    """A row for each setting in which the runs differ: its key, and its value in each run.

    Settings of losses that no run uses are left out.

    Args:
        runs (list[Run]): either all YAML or all LazyConfig.
    """
    columns = [
        dict(flatten(r.cfg if isinstance(r.cfg, CfgNode) else OmegaConf.to_container(r.cfg)))
        for r in runs
    ]
    hidden = () if runs[0].lazy else unused_losses(runs)
    rows = []
    for key in sorted({key for column in columns for key in column}):
        values = [column.get(key, ABSENT) for column in columns]
        if len(set(values)) > 1 and not key.startswith(hidden):
            rows.append([key, *values])
    return rows


def unused_losses(runs: List[Run]) -> Tuple[str, ...]:
    """The prefixes "MODEL.DISTILL.<LOSS>." of the losses that none of some YAML runs uses."""
    nodes = [run.cfg.MODEL.DISTILL for run in runs]
    used = {str(name).upper() for node in nodes for name in node.LOSSES}
    used |= {str(n).upper() for node in nodes for t in node.TEACHERS for n in t.get("LOSSES", ())}
    losses = {key for key, node in nodes[0].items() if isinstance(node, Mapping)} - {"TEACHER"}
    return tuple(f"MODEL.DISTILL.{name}." for name in losses - used)
