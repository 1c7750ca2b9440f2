"""The maps of student and teacher, and what their heads predict, outside of training."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Tuple

import torch
from torch import Tensor, nn

from .distiller import Captured, Distiller
from .meta_arch import capture_backbone
from .predictions import Predictions, capture_heads


@torch.no_grad()
def paired_outputs(
    model: Any, distiller: Distiller, batch: List[Dict]
) -> Tuple[Dict[str, Tensor], Dict[str, Tensor], Predictions, Predictions]:
    """Runs the student's inference on a batch, and takes what the distiller compares.

    Args:
        model (nn.Module): the student.
        distiller (Distiller): its own, or one of its own.
        batch (list[dict]): what the student takes; images may have targets.

    Returns:
        (dict, dict), (dict, dict): maps and predictions, see :meth:`Distiller.match`. Box heads
        predict for the detections.
    """
    with evaluation_mode(model):
        heads = capture_heads(model, distiller.kinds, [distiller.layer])
        with capture_backbone(model.backbone) as captured, heads as outputs:
            model(batch)
        taken = Captured(batch, **captured, preprocessing=model.preprocessing)
        return distiller.match(taken, outputs)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts all modules into evaluation mode for the block, and then each into its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():  # a module comes before those below it
            if module.training != training:
                module.train(training)  # torchvision's graphs exchange their code here
