"""The settings in which runs differ."""

from typing import Dict, List, Tuple

from detectron2.config import CfgNode
from omegaconf import OmegaConf

from ssimkd.checkpoint.same_run import flatten
from ssimkd.losses import KD_LOSS_REGISTRY
from ssimkd.modeling.several_teachers import parse_teacher_entry

from .run import Run

ABSENT = "-"
EVALUATION = ("INPUT.", "MODEL.", "TEST.", "model.", "dataloader.test.")
TRAINING = (  # of those, the ones that matter to a training alone
    *("MODEL.DISTILL.", "MODEL.META_ARCHITECTURE", "MODEL.WEIGHTS", "INPUT.MIN_SIZE_TRAIN"),
    *("model.distiller", "model._target_", "model.log_gradients"),
)
OF_A_RUN = ("OUTPUT_DIR", "SEED", "train.output_dir", "train.seed")  # runs may differ in them


def settings_of(run: Run) -> Dict[str, str]:
    """The settings of a run by key, in words, without its folder, its seed and unused losses."""
    cfg = run.cfg if isinstance(run.cfg, CfgNode) else OmegaConf.to_container(run.cfg)
    unused = () if run.lazy else tuple(f"MODEL.DISTILL.{name}." for name in unused_losses(run))
    return {
        key: text
        for key, text in flatten(cfg)
        if key not in OF_A_RUN and not key.startswith(unused)
    }


def evaluation_settings(run: Run) -> List[Tuple[str, str]]:
    """The settings of a run that act in an evaluation, and their values in words."""
    return [
        (key, text)
        for key, text in sorted(settings_of(run).items())
        if key.startswith(EVALUATION) and not key.startswith(TRAINING)
    ]


def differences(runs: List[Run]) -> List[List[str]]:
    """A row for each setting in which runs differ: its key, and its value in each run.

    Args:
        runs (list[Run]): either all YAML or all LazyConfig.
    """
    columns = [settings_of(run) for run in runs]
    rows = []
    for key in sorted({key for column in columns for key in column}):
        values = [column.get(key, ABSENT) for column in columns]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return rows


def unused_losses(run: Run) -> List[str]:
    """The nodes of MODEL.DISTILL of the losses that a YAML run does not use."""
    node = run.cfg.MODEL.DISTILL
    used = set(node.LOSSES) if node.TEACHER.CONFIG and not node.TEACHERS else set()
    for number, entry in enumerate(node.TEACHERS, start=1):
        used |= {*parse_teacher_entry(run.cfg, entry, number)[1].MODEL.DISTILL.LOSSES}
    return [name.upper() for name, _ in KD_LOSS_REGISTRY if name not in used]
