"""Finds the losses from which a student learns nothing in a run, though its config names them."""

from typing import Dict

from .distiller import Distiller


def idle_losses(distiller: Distiller, iterations: int) -> Dict[str, str]:
    """Loss -> the setting that keeps it from the student.

    A loss itself refuses factors that are all 0.

    Args:
        distiller (Distiller): the student's.
        iterations (int): of the run.
    """
    levels = distiller.level_weights.values()
    distils = distiller.schedule.iterations(iterations)
    idle = {}
    for name, loss in distiller.losses.items():
        key = f"MODEL.DISTILL.{name.upper()}"
        if distiller.loss_weight == 0:
            idle[name] = "MODEL.DISTILL.TEACHER.LOSS_WEIGHT is 0"
        elif loss.weight == 0:
            idle[name] = f"{key}.WEIGHT is 0"
        elif loss.of_maps and levels and not any(levels):
            idle[name] = "all of MODEL.DISTILL.LEVEL_WEIGHTS are 0"
        elif loss.first_iteration >= distils:
            start = f"{loss.starts_after.upper()} is {loss.first_iteration}"
            idle[name] = f"{key}.{start}, beyond the last step"
    return idle
