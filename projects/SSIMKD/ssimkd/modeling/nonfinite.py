"""Finds out where NaN or infinity in a distillation loss comes from."""

from typing import Any, Dict, Iterator, List

import torch
from torch import nn

from ssimkd.utils.random_state import preserve_random_state

from .distiller import Distiller
from .paired_maps import evaluation_mode, paired_maps
from .several_teachers import distillers_of


def explain_nonfinite(model: nn.Module, batch: List[Dict]) -> str:
    """Runs student and teachers on a batch again, and says which losses are not finite, and why.

    They run in evaluation mode and in the precision of their weights. So batch statistics and
    random numbers stay as they are, and what only mixed precision makes infinite is not found.

    Args:
        model (nn.Module): a student; there is nothing to say about another model.
        batch (list[dict]): the images and targets of one training step.

    Returns:
        str: for example "ssim_kd/p3 is nan, because the teacher's p3 holds NaN or infinity", with
        the teacher's name before it where there are several; "" if all is finite.
    """
    found: List[str] = []
    with preserve_random_state(), evaluation_mode(model):
        for name, distiller in distillers_of(model):
            if distiller.enabled:
                prefix = f"{name}/" if name else ""
                found += [prefix + text for text in nonfinite_terms(model, distiller, batch)]
    return "; ".join(found)


def nonfinite_terms(model: Any, distiller: Distiller, batch: List[Dict]) -> Iterator[str]:
    """A text for each loss and level of one teacher that is not finite."""
    student, teacher = paired_maps(model, distiller, batch)
    for loss, terms in distiller.compare(student, teacher, batch).items():
        for level, value in terms.items():
            if not torch.isfinite(value):
                reason = "though both maps are finite"
                for whose, maps in (("student", student), ("teacher", teacher)):
                    if level in maps and not torch.isfinite(maps[level]).all():
                        reason = f"because the {whose}'s {level} holds NaN or infinity"
                yield f"{loss}_kd/{level} is {value.item()}, {reason}"
