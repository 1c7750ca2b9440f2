"""The embedded data set."""

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from pycocotools.coco import COCO
from ssimkd import shapes


def test_a_seed_draws_one_image():
    image, objects = shapes.draw_image((0, 5))
    again, same = shapes.draw_image((0, 5))
    assert np.array_equal(image, again) and objects == same
    assert not np.array_equal(image, shapes.draw_image((1, 5))[0])


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_a_box_is_the_extent_of_its_object(name):
    for seed in range(20):
        mask = shapes.draw_mask(np.random.default_rng(seed), name, (96, 128)) > 127
        x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
        rows, columns = np.nonzero(mask)
        assert (x, y) == (columns.min(), rows.min())
        assert (x + w - 1, y + h - 1) == (columns.max(), rows.max())


def test_a_split_is_coco_on_disk(tmp_path):
    shapes.write_split(str(tmp_path), "val", 12)
    coco = COCO(str(tmp_path / "instances_val.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(shapes.CLASSES)
    assert len(coco.imgs) == 12
    for record in coco.imgs.values():
        image = cv2.imread(str(tmp_path / "val" / record["file_name"]))
        assert image.shape == (record["height"], record["width"], 3)
        for annotation in coco.imgToAnns[record["id"]]:
            x, y, w, h = annotation["bbox"]
            assert w > 0 and h > 0 and x >= 0 and y >= 0
            assert x + w <= record["width"] and y + h <= record["height"]


def test_train_and_val_share_no_image_and_hold_every_class():
    train, val = (DatasetCatalog.get(f"ssimkd_shapes_{split}") for split in ("train", "val"))
    assert (len(train), len(val)) == (2000, 400)
    for split in (train, val):
        assert {a["category_id"] for r in split for a in r["annotations"]} == set(range(4))
        assert {(r["height"], r["width"]) for r in split} == set(shapes.SIZES)
    pictures = [{open(r["file_name"], "rb").read() for r in split} for split in (train, val)]
    assert not pictures[0] & pictures[1]


def test_a_drawing_that_failed_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 2, "val": 2})
    root = tmp_path / "data" / shapes.FOLDER
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(shapes.json, "dump", lambda *args: 1 / 0)
        shapes.ensure_shapes(str(root))
    assert not list(root.parent.iterdir())
    shapes.ensure_shapes(str(root))
    assert sorted(p.name for p in root.iterdir()) == [
        "instances_train.json", "instances_val.json", "train", "val"
    ]  # fmt: skip
    before = (root / "instances_val.json").stat().st_mtime_ns
    shapes.ensure_shapes(str(root))  # there already: untouched
    assert (root / "instances_val.json").stat().st_mtime_ns == before
