"""The Shapes data, as files and as what Detectron2's detectors train with."""

import json

import cv2
import numpy as np
import pytest
import torch
from conftest import shapes_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.structures.masks import polygons_to_bitmask
from PIL import Image
from ssimkd.data import shapes
from ssimkd.data.shapes_annotations import KEYPOINTS

MASK_RCNN = ("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1)
MASK_RCNN += ("MODEL.ROI_MASK_HEAD.CONV_DIM", 16)
KEYPOINT_RCNN = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5)
KEYPOINT_RCNN += ("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (16,))
PANOPTIC_FPN = (*MASK_RCNN, "MODEL.META_ARCHITECTURE", "PanopticFPN")
PANOPTIC_FPN += ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32)


def register_anew():
    for name in [name for name in DatasetCatalog.list() if name.startswith(shapes.FOLDER)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    shapes.register_shapes()
    shapes.register_search()


@pytest.fixture
def few_images(few_shapes):
    """The names of the data sets refer to the few images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", few_shapes)
        register_anew()
    yield
    register_anew()


def seen(index, split=1):
    """Draws an image: its owner, its objects, and the visible part of each, (N, H, W)."""
    _, owner, objects = shapes.draw_image((split, index))
    masks = owner == np.arange(1, len(objects) + 1, dtype=np.uint8)[:, None, None]
    return owner, objects, torch.from_numpy(masks)


def test_the_images_are_those_that_the_kept_teacher_was_trained_on():
    image, _, objects = shapes.draw_image((0, 0))
    assert [(item.label, item.box) for item in objects] == [
        (2, [31, 19, 18, 16]), (3, [69, 48, 27, 33]), (1, [0, 75, 28, 30]), (2, [70, 71, 16, 18])
    ]  # fmt: skip
    # These are means of 32 x 32 pixels, since sines may round differently on another processor.
    blocks = cv2.resize(image.astype(float), (3, 4), interpolation=cv2.INTER_AREA)
    expected = [
        [[108.92, 232.48, 213.06], [113.78, 202.1, 177.8], [99.47, 209.34, 219.2]],
        [[73.34, 212.75, 189.52], [109.67, 189.83, 88.99], [111.42, 208.41, 206.52]],
        [[91.36, 186.52, 190.64], [42.3, 202.14, 191.36], [65.72, 184.04, 199.57]],
        [[55.6, 195.07, 212.43], [35.57, 202.98, 202.82], [36.02, 202.57, 202.33]],
    ]
    assert np.abs(blocks - expected).max() < 0.01  # One pixel by 10 levels exceeds this.


def test_the_owner_of_a_pixel_is_the_visible_object(monkeypatch):
    step = 42  # grey levels between objects: 14 deviations of the noise's mean over colours

    def flat_textures():
        greys = iter(range(step, 256, step))
        return lambda rng, size, contrast: np.full((*size, 3), float(next(greys)))

    monkeypatch.setattr(shapes, "draw_background", lambda rng, size: np.zeros((*size, 3)))
    for seed in range(20):
        monkeypatch.setattr(shapes, "draw_texture", flat_textures())
        image, owner, objects = shapes.draw_image((0, seed))
        kernel = np.ones((5, 5), np.uint8)
        inner = cv2.erode(owner, kernel) == cv2.dilate(owner, kernel)  # At edges colours mix.
        assert np.array_equal(np.rint(image.mean(axis=2) / step)[inner], owner[inner])
        for index, item in enumerate(objects):
            x, y, w, h = item.box
            rows, columns = np.nonzero(owner == index + 1)
            assert x <= columns.min() and columns.max() < x + w
            assert y <= rows.min() and rows.max() < y + h


def test_panoptic_pictures_agree_with_their_json(tmp_path):
    shapes.write_split(str(tmp_path), "val", 12)
    content = json.loads((tmp_path / "panoptic_val.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"] if c["isthing"]}
    for index, annotation in enumerate(content["annotations"]):
        owner, objects, masks = seen(index)
        rgb = np.array(Image.open(tmp_path / "panoptic_val" / annotation["file_name"]), int)
        ids = rgb @ [1, 256, 256**2]
        stuff = np.array(Image.open(tmp_path / "sem_seg_val" / annotation["file_name"]))
        assert np.array_equal(stuff == shapes.STUFF.index("background"), owner == 0)
        background, *things = annotation["segments_info"]
        assert names.get(background["category_id"]) is None
        assert np.array_equal(ids == background["id"], owner == 0)
        for segment, item, mask in zip(things, objects, masks.numpy()):
            assert names[segment["category_id"]] == shapes.CLASSES[item.label]
            assert np.array_equal(ids == segment["id"], mask) and segment["area"] == mask.sum()
        assert len(things) == len(objects) and (ids > 0).all()


@pytest.mark.parametrize("flip", [False, True])
def test_detectron2_maps_masks_keypoints_and_stuff(few_images, flip):
    cfg = shapes_cfg("vanilla", *PANOPTIC_FPN, *KEYPOINT_RCNN)
    cfg.DATASETS.TRAIN = ("ssimkd_shapes_panoptic_train",)
    mapper = DatasetMapper(cfg, True, augmentations=[T.RandomFlip(prob=float(flip))])
    for index, record in enumerate(DatasetCatalog.get("ssimkd_shapes_panoptic_train")[:12]):
        owner, objects, masks = seen(index, split=0)
        width = owner.shape[1]
        mapped = mapper(record)
        found = mapped["instances"]
        drawn = torch.stack(
            [torch.from_numpy(polygons_to_bitmask(p, *owner.shape)) for p in found.gt_masks]
        )
        assert torch.equal(drawn, masks.flip(2) if flip else masks)
        background = torch.from_numpy(owner == 0)
        assert torch.equal(mapped["sem_seg"] == 1, background.flip(1) if flip else background)
        assert found.gt_classes.tolist() == [item.label for item in objects]
        points = found.gt_keypoints.tensor
        if flip:
            points[:, :, 0] = width - points[:, :, 0]
            points = points[:, [0, 1, 2, 4, 3]]
        for mask, (center, top, bottom, left, right), item in zip(masks, points, objects):
            assert center[:2].tolist() == [v + 0.5 for v in item.center]
            rows, columns = (t.double() + 0.5 for t in mask.nonzero(as_tuple=True))
            assert (top[1], bottom[1]) == (rows.min(), rows.max())
            assert (left[0], right[0]) == (columns.min(), columns.max())


def test_train_and_val_share_no_image_and_hold_every_class(few_images):
    train, val = (DatasetCatalog.get(f"ssimkd_shapes_{split}") for split in ("train", "val"))
    assert (len(train), len(val)) == (40, 12)
    assert {a["category_id"] for r in val for a in r["annotations"]} == set(range(4))
    assert {(r["height"], r["width"]) for r in val} == set(shapes.SIZES)
    pictures = [{open(r["file_name"], "rb").read() for r in split} for split in (train, val)]
    assert not pictures[0] & pictures[1]


def test_a_failure_while_drawing_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 2, "val": 2})
    root = tmp_path / "data" / shapes.FOLDER
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(shapes.json, "dumps", lambda *args: 1 / 0)
        shapes.ensure_shapes(str(root))
    assert not list(root.parent.iterdir())
    shapes.ensure_shapes(str(root))
    assert sorted(p.name for p in root.iterdir()) == [
        "instances_train.json", "instances_val.json", "panoptic_train", "panoptic_train.json",
        "panoptic_val", "panoptic_val.json", "sem_seg_train", "sem_seg_val", "train", "val"
    ]  # fmt: skip
    before = (root / "instances_val.json").stat().st_mtime_ns
    shapes.ensure_shapes(str(root))  # A set that exists is left alone.
    assert (root / "instances_val.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["ssimkd_shapes_val", "ssimkd_shapes_panoptic_val"])
def test_the_drawn_objects_have_an_ap_of_100(few_images, name):
    evaluator = COCOEvaluator(
        name, distributed=False, use_fast_impl=False, kpt_oks_sigmas=[0.05] * 5
    )
    evaluator.reset()
    for index, record in enumerate(DatasetCatalog.get(name)):
        owner, objects, masks = seen(index)
        result = Instances(owner.shape, pred_masks=masks, scores=torch.ones(len(objects)))
        boxes = torch.tensor([item.box for item in objects]).float()
        result.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        result.pred_classes = torch.tensor([item.label for item in objects])
        points = torch.tensor([a["keypoints"] for a in record["annotations"]])
        result.pred_keypoints = points.view(len(objects), len(KEYPOINTS), 3)
        evaluator.process([record], [{"instances": result}])
    metrics = evaluator.evaluate()
    assert {task: values["AP"] for task, values in metrics.items()} == {
        "bbox": pytest.approx(100), "segm": pytest.approx(100), "keypoints": pytest.approx(100)
    }  # fmt: skip
