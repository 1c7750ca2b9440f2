"""Shared pieces: small detectors on the CPU, teachers made on the spot, random batches."""

import os
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from ssimkd import add_ssimkd_config, shapes

ROOT = Path(__file__).resolve().parents[1]
os.chdir(ROOT)  # configs name files relative to the repository


def shapes_cfg(name, *opts):
    """A config of the embedded data: "vanilla", "ssimkd" or "teacher"."""
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    cfg.merge_from_file(str(ROOT / f"configs/shapes/{name}.yaml"))
    cfg.merge_from_list(list(opts))
    return cfg


def image_batch(*sizes, seed=0, boxes=1):
    """What a model takes in training: random images of the sizes given, `boxes` objects each."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for height, width in sizes:
        instances = Instances((height, width))
        box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
        instances.gt_boxes = Boxes(box.repeat(boxes, 1))
        instances.gt_classes = torch.zeros(boxes, dtype=torch.long)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A checkpoint of configs/shapes/teacher.yaml with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": build_model(shapes_cfg("teacher")).state_dict()}, path)
    return str(path)


@pytest.fixture(scope="session")
def few_shapes(tmp_path_factory):
    """A folder for DETECTRON2_DATASETS with a few images of the embedded data set."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 40, "val": 12})
        shapes.ensure_shapes(str(folder / shapes.FOLDER))
    return str(folder)


@pytest.fixture
def student(teacher_file):
    """Overrides -> a small DistillRCNN in training mode, whose teacher has random weights."""

    def build(*opts):
        torch.manual_seed(1)
        weights = ("MODEL.DISTILL.TEACHER.WEIGHTS", teacher_file)
        return build_model(shapes_cfg("ssimkd", *weights, *opts)).train()

    return build
