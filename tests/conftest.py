"""What many tests need: small detectors on the CPU, random teachers and random batches."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from ssimkd import add_ssimkd_config
from ssimkd.data import shapes
from ssimkd.utils.compat import model_zoo

ROOT = Path(__file__).resolve().parents[1]
os.chdir(ROOT)  # configs name files relative to the repository


def shapes_cfg(name, *opts):
    """A config of the Shapes data: "vanilla", "ssimkd" or "teacher"."""
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


# Cuts the width of any YAML config of the zoo.
NARROW = (
    ("MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    ("MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    ("MODEL.RESNETS.NUM_GROUPS", 1),
    ("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    ("MODEL.FPN.OUT_CHANNELS", 16),
    ("MODEL.RPN.CONV_DIMS", [16]),
    ("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50),
    ("MODEL.RPN.PRE_NMS_TOPK_TEST", 50),
    ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
    ("MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    ("MODEL.ROI_BOX_HEAD.CONV_DIM", 16),
    ("MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
    ("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (16, 16)),
    ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 16),
    ("MODEL.SEM_SEG_HEAD.NORM", ""),
)


def narrow_opts(name):
    """NARROW as overrides for a zoo config, for the keys that the installed Detectron2 has."""
    cfg = get_cfg()
    opts = []
    for key, value in NARROW:
        _, node, leaf = key.split(".")
        if leaf in cfg.MODEL[node]:
            if "_gn" in name and isinstance(value, int) and 1 < value < 32:
                value = 32  # group norm has 32 groups
            opts += [key, value]
    return opts


def zoo_cfg(name, *opts):
    """A YAML config of the zoo, narrow, on the CPU."""
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name))
    cfg.merge_from_list([*narrow_opts(name), "MODEL.DEVICE", "cpu", *opts])
    return cfg


def rich_batch(*sizes, seed=0):
    """image_batch with masks, keypoints and a semantic segmentation as well."""
    batch = image_batch(*sizes, seed=seed)
    for x in batch:
        instances = x["instances"]
        square = [8.0, 8.0, 40.0, 8.0, 40.0, 40.0, 8.0, 40.0]
        instances.gt_masks = PolygonMasks([[np.array(square)] for _ in range(len(instances))])
        points = torch.full((len(instances), 17, 3), 20.0)
        points[..., 2] = 2  # visible
        instances.gt_keypoints = Keypoints(points)
        x["sem_seg"] = torch.zeros(x["image"].shape[-2:], dtype=torch.long)
    return batch


def save_teacher(cfg, path, seed=0):
    """Writes random weights for a config, a CfgNode or a lazy model node; returns the path."""
    torch.manual_seed(seed)
    model = build_model(cfg) if isinstance(cfg, CfgNode) else instantiate(cfg)
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.fixture(autouse=True)
def logger_as_before():
    """Undoes what a test changes in the package's logger, because caplog needs propagation."""
    logger = logging.getLogger("ssimkd")
    handlers = logger.handlers[:]
    yield
    logger.handlers, logger.propagate = handlers, True


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A checkpoint of configs/shapes/teacher.yaml with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": build_model(shapes_cfg("teacher")).state_dict()}, path)
    return str(path)


@pytest.fixture(scope="session")
def few_shapes(tmp_path_factory):
    """A folder for DETECTRON2_DATASETS with a few images of the Shapes data."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 40, "val": 12})
        shapes.ensure_shapes(str(folder / shapes.FOLDER))
    return str(folder)


@pytest.fixture(scope="session")
def few_names(few_shapes):
    """The same images as data sets of this process: names for DATASETS.TRAIN and .TEST."""
    names = ("few_train", "few_val")
    for name in names:
        split = name[len("few_") :]
        root = f"{few_shapes}/{shapes.FOLDER}"
        classes = {"thing_classes": list(shapes.CLASSES)}
        register_coco_instances(name, classes, f"{root}/instances_{split}.json", f"{root}/{split}")
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def student(teacher_file):
    """Overrides -> a small DistillRCNN in training mode, whose teacher has random weights."""

    def build(*opts):
        torch.manual_seed(1)
        weights = ("MODEL.DISTILL.TEACHER.WEIGHTS", teacher_file)
        return build_model(shapes_cfg("ssimkd", *weights, *opts)).train()

    return build


@pytest.fixture(scope="session")
def few_images(few_shapes):
    """The Shapes data with only a few images, for this process and for those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", few_shapes)
        patch.setenv("OMP_NUM_THREADS", "1")  # sums in one order
        yield


@pytest.fixture(scope="session")
def yaml(tmp_path_factory, few_images):
    """A whole run of a YAML config, which other runs are compared with."""
    from runs import Reference, yaml_words

    return Reference(yaml_words, tmp_path_factory.mktemp("yaml"))


@pytest.fixture(scope="session")
def lazy(tmp_path_factory, few_images):
    """The same of a LazyConfig."""
    from runs import Reference, lazy_words

    return Reference(lazy_words, tmp_path_factory.mktemp("lazy"))


@pytest.fixture(params=["yaml", "lazy"])
def reference(request):
    """The run of a YAML config, and then that of a LazyConfig."""
    return request.getfixturevalue(request.param)
