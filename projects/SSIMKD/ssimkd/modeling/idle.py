"""Finds the losses from which a student learns nothing in a run, though its config names them."""

from typing import Any, Dict, Iterator, List

import torch

from ssimkd.losses import KDLoss
from ssimkd.utils.random_state import preserve_random_state

from .distiller import Distiller
from .nonfinite import tensors_in
from .paired_maps import paired_outputs

AFTER_ALL = 10**9  # an iteration after everything that a loss counts


def idle_by_settings(distiller: Distiller) -> Dict[str, str]:
    """Loss -> the setting of 0 that keeps it from the student."""
    levels = distiller.level_weights.values()
    idle = {}
    for name, loss in distiller.losses.items():
        if distiller.loss_weight == 0:
            idle[name] = "MODEL.DISTILL.TEACHER.LOSS_WEIGHT is 0"
        elif loss.weight == 0:
            idle[name] = f"MODEL.DISTILL.{name.upper()}.WEIGHT is 0"
        elif loss.compares == ("maps",) and levels and not any(levels):
            idle[name] = "all of MODEL.DISTILL.LEVEL_WEIGHTS are 0"
    return idle


def idle_by_gradient(
    model: Any, distiller: Distiller, batch: List[Dict], iterations: int
) -> Dict[str, str]:
    """Loss -> why it sends the student no gradient, on a batch in the last iteration that counts.

    Args:
        model (nn.Module): the student.
        distiller (Distiller): its own, with its teacher.
        batch (list[dict]): images with targets.
        iterations (int): of the run.
    """
    last = distiller.schedule.iterations(iterations) - 1
    with preserve_random_state():
        student, teacher, *answers = paired_outputs(model, distiller, batch)
    leaves = [x for given in (student, answers[0]) for x in tensors_in(given)]
    leaves = [x.requires_grad_() for x in leaves if x.is_floating_point()]
    equal = all(torch.equal(x, teacher[level]) for level, x in student.items())
    if equal and not answers[0]:
        return {}  # nothing is left to learn

    def silent(iteration: int) -> Iterator[str]:
        with preserve_random_state(), torch.enable_grad():
            terms = distiller.compare(student, teacher, batch, iteration, answers)
            for name, parts in terms.items():
                value = torch.stack(list(parts.values())).sum()
                found: Any = ()
                if value.requires_grad:
                    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
                if not any(x is not None and x.any() for x in found):
                    yield name

    idle = {}
    dead = [x for x in silent(last) if learns(distiller.losses[x], batch)]
    never = set(silent(AFTER_ALL)) if dead else set()
    for name in dead:
        key = f"MODEL.DISTILL.{name.upper()}"
        if name in never:
            idle[name] = f"its options in {key} leave no gradient"
        else:
            counts = [x for x in vars(distiller.losses[name]) if x.endswith("_iters")]
            option = f"{key}.{counts[0].upper()}" if counts else key
            idle[name] = f"the run ends before it begins to act, see {option}"
    return idle


def learns(loss: KDLoss, batch: List[Dict]) -> bool:
    """Whether a loss can learn from a batch: one that needs boxes needs at least one."""
    return not loss.needs_boxes or any(len(x.get("instances", ())) for x in batch)
