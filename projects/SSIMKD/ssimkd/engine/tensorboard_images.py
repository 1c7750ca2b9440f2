"""Pictures on TensorBoard while a run trains: detections, and where student and teacher differ.

They always show the same image, the first of the test set. Detectron2's own key `VIS_PERIOD`
(.yaml) or `model.vis_period` (.py) sets the iterations between pictures; 0 means none.
"""

from typing import Any, Callable, Dict, Optional, Sequence

import numpy as np
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ssimkd.evaluation.predictor import draw_detections
from ssimkd.evaluation.similarity import render, similarity_maps
from ssimkd.modeling.paired_maps import evaluation_mode
from ssimkd.utils.random_state import preserve_random_state

LEAST_SCORE = 0.3  # early in a run, detections of lower scores would cover the image


def build_pictures(
    model: Any, names: Sequence[str], load: Callable[[], Any]
) -> Optional["Pictures"]:
    """The hook that draws pictures, on the main process; None where no pictures are wanted.

    Args:
        model (nn.Module): without DistributedDataParallel around it.
        names (sequence[str]): the test sets; there are no pictures without a test set.
        load (callable): returns the items of the first test set, as the model takes them.
    """
    period = getattr(model, "vis_period", 0)
    if not (period > 0 and len(names) and comm.is_main_process()):
        return None
    with preserve_random_state():
        item = load()[0]
    return Pictures(model, item, MetadataCatalog.get(names[0]), period)


class Pictures(HookBase):
    """Puts pictures into the event storage: before the training, and every `period` iterations.

    Modes, batch statistics and random generators stay as they are, so the training is the same.

    Args:
        model (nn.Module): a student or a plain detector.
        item (dict): what the model takes, with "file_name".
        metadata (Metadata): names the classes.
        period (int): iterations between pictures.
    """

    def __init__(self, model: Any, item: Dict[str, Any], metadata: Metadata, period: int) -> None:
        self.model, self.item, self.metadata, self.period = model, item, metadata, period

    def before_train(self) -> None:
        """Shows the state that training starts from, so that a failure comes early."""
        self.show()

    def after_step(self) -> None:
        """Shows the pictures every `period` iterations."""
        if (self.trainer.iter + 1) % self.period == 0:
            self.show()

    def show(self) -> None:
        """Puts the present pictures into the event storage."""
        with preserve_random_state(), evaluation_mode(self.model), torch.no_grad():
            pictures = self.draw()
        for name, picture in pictures.items():
            get_event_storage().put_image(name, picture.transpose(2, 0, 1))

    def draw(self) -> Dict[str, np.ndarray]:
        """Name -> (H, W, 3) uint8, RGB: "detections" and, with a teacher, "loss_maps"."""
        pictures, name = {}, self.item["file_name"]
        found = self.model([self.item])[0].get("instances")
        if found is not None:
            shown = found[found.scores >= LEAST_SCORE]
            pictures["detections"] = draw_detections(name, shown, self.metadata)
        maps = similarity_maps(self.model, self.item)
        if maps:
            pictures["loss_maps"] = render(maps, read_image(name, "RGB"))
        return pictures
