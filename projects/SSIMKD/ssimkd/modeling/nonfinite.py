"""Finds out where NaN or infinity in a distillation loss comes from."""

from dataclasses import is_dataclass
from typing import Any, Dict, Iterator, List

import torch
from torch import Tensor, nn

from ssimkd.utils.random_state import preserve_random_state

from .distiller import Distiller
from .meta_arch import split_by_labels
from .paired_maps import evaluation_mode, paired_outputs
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
                labeled, unlabeled = split_by_labels(batch)
                texts = [*nonfinite_terms(model, distiller, labeled)]
                if unlabeled and distiller.takes_unlabeled:
                    texts += nonfinite_terms(model, distiller, unlabeled, labeled=False)
                found += [prefix + text for text in texts]
    return "; ".join(found)


def nonfinite_terms(
    model: Any, distiller: Distiller, batch: List[Dict], labeled: bool = True
) -> Iterator[str]:
    """A text for each loss and level of one teacher that is not finite."""
    student, teacher, *predictions = paired_outputs(model, distiller, batch)
    spoilt: Dict[str, List[str]] = {}  # level, or kind of head -> whose it is
    for whose, maps, of_heads in zip(("student", "teacher"), (student, teacher), predictions):
        for name, given in (*maps.items(), *of_heads.items()):
            if not all(torch.isfinite(x).all() for x in tensors_in(given)):
                spoilt.setdefault(name, []).append(f"the {whose}'s")
    compared = distiller.compare(student, teacher, batch, 0, predictions, labeled=labeled)
    for name, terms in compared.items():
        loss = distiller.losses[name]
        for level, value in terms.items():
            if not torch.isfinite(value):
                found = [place for place in (level, *loss.compares) if place in spoilt]
                if not found and loss.of_maps:  # a part may depend on the maps of all levels
                    found = [place for place in spoilt if place in student]
                reason = "though both sides are finite"
                if found:
                    what = found[-1] if found[-1] in student else f"{found[-1]} head"
                    whose = " and ".join(spoilt[found[-1]])
                    reason = f"because {whose} {what} holds NaN or infinity"
                yield f"{name}_kd/{level} is {value.item()}, {reason}"


def tensors_in(given: Any) -> Iterator[Tensor]:
    """The tensors of a map, or of what heads predict."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (list, dict)):
        for value in given.values() if isinstance(given, dict) else given:
            yield from tensors_in(value)
    elif is_dataclass(given):
        for value in vars(given).values():
            yield from tensors_in(value)
