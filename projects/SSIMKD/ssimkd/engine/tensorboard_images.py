"""Pictures of a run on TensorBoard: what the student finds, and where it differs from its teacher.

They show one image of the test set, the same at all times. Detectron2's own key asks for them:
`VIS_PERIOD` (.yaml), `model.vis_period` (.py), in iterations; 0 is none.
"""

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Optional, Sequence

import numpy as np
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from ssimkd.evaluation.predictor import draw_detections
from ssimkd.evaluation.similarity import render, similarity_maps
from ssimkd.modeling.meta_arch import image_format_of
from ssimkd.utils.random_state import preserve_random_state

LEAST_SCORE = 0.3  # of a detection that is drawn: early in a run the others cover the image


def build_pictures(
    model: Any, names: Sequence[str], load: Callable[[], Any]
) -> Optional["Pictures"]:
    """The hook that takes pictures; None where a run asks for none, or on another process.

    Args:
        model (nn.Module): without DistributedDataParallel around it.
        names (sequence[str]): of the test sets; without any there are no pictures.
        load (callable): gives the first one's items, as the model takes them.
    """
    period = getattr(model, "vis_period", 0)
    if not (period > 0 and len(names) and comm.is_main_process()):
        return None
    with preserve_random_state():
        item = load()[0]
    return Pictures(model, item, MetadataCatalog.get(names[0]), period)


class Pictures(HookBase):
    """Puts pictures into the event storage, the first before training, so that it fails early.

    Training goes on as if there were none: modes, batch statistics and random generators stay.

    Args:
        model (nn.Module): a student or a plain detector.
        item (dict): what the model takes, with "file_name".
        metadata (Metadata): names the classes.
        period (int): iterations between pictures.
    """

    def __init__(self, model: Any, item: Dict[str, Any], metadata: Metadata, period: int) -> None:
        self.model, self.item, self.metadata, self.period = model, item, metadata, period

    def before_train(self) -> None:
        """The state that training starts from."""
        self.show()

    def after_step(self) -> None:
        """Each `period` iterations."""
        if (self.trainer.iter + 1) % self.period == 0:
            self.show()

    def show(self) -> None:
        """Puts the pictures of now."""
        with preserve_random_state(), evaluation_mode(self.model), torch.no_grad():
            pictures = self.draw()
        for name, picture in pictures.items():
            get_event_storage().put_image(name, picture.transpose(2, 0, 1))

    def draw(self) -> Dict[str, np.ndarray]:
        """Name -> (H, W, 3) uint8, RGB. What a detector has no part for is not there."""
        pictures = {}
        found = self.model([self.item])[0]
        if "instances" in found:
            name, found = self.item["file_name"], found["instances"]
            shown = found[found.scores >= LEAST_SCORE]
            pictures["detections"] = draw_detections(name, shown, self.metadata)
        maps = similarity_maps(self.model, self.item)
        if maps:
            image = self.item["image"].permute(1, 2, 0)
            rgb = convert_image_to_rgb(image, image_format_of(self.model))
            pictures["loss_maps"] = render(maps, rgb)
        return pictures


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own mode again, parts set apart too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
