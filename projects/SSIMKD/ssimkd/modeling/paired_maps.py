"""The maps of student and teacher for a batch, outside of training."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Tuple

import torch
from torch import Tensor, nn

from .distiller import Distiller
from .meta_arch import capture_backbone


@torch.no_grad()
def paired_maps(
    model: Any, distiller: Distiller, batch: List[Dict]
) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """Runs the student's inference on a batch, and takes the maps of its backbone and its teacher.

    Args:
        model (nn.Module): the student.
        distiller (Distiller): its own, or one of its own.
        batch (list[dict]): what the student takes; images may have targets.

    Returns:
        (dict, dict): see :meth:`Distiller.match_maps`.
    """
    with evaluation_mode(model):
        with capture_backbone(model.backbone) as captured:
            model(batch)
        return distiller.match_maps(
            batch, captured["maps"], captured["images"], model.preprocessing
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts all modules into evaluation mode for the block, and then each into its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
