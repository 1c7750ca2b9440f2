"""Masks as polygons, keypoints, and objects of which nothing is seen."""

import cv2
import numpy as np
import pytest
from conftest import shapes_cfg
from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json
from detectron2.structures import PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from ssimkd.data import shapes
from ssimkd.data import shapes_annotations as annotations

HIDDEN = (0, 110)  # seed of an image whose first object is covered by later ones


def ring(radius, hole):
    mask = np.zeros((96, 128), np.uint8)
    cv2.circle(mask, (64, 48), radius, 1, -1)
    cv2.circle(mask, (64, 48), hole, 0, -1)
    return mask


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_polygons_decode_to_the_mask(density):
    # Noise has parts, holes, islands in holes and diagonal contacts.
    rng = np.random.default_rng(0)
    for size in [(1, 1), (1, 9), (7, 2), (24, 31), (96, 128)]:
        mask = (rng.random(size) < density).astype(np.uint8)
        paths = annotations.polygons(mask)
        assert np.array_equal(polygons_to_bitmask(paths, *size), mask)
        parts = cv2.connectedComponents(mask)[0] - 1  # of eight neighbours
        assert len(paths) == max(parts, 1)


def test_the_area_of_polygons_is_the_number_of_pixels():
    masks = [ring(30, 16), ring(20, 0), np.zeros((96, 128), np.uint8)]
    area = PolygonMasks([annotations.polygons(mask) for mask in masks]).area()
    assert area.tolist() == [mask.sum() for mask in masks]


def test_keypoints_of_a_mask_known_by_hand():
    owner = np.zeros((8, 9), np.uint8)
    owner[2, 3:6] = 1  # top: the middle of three
    owner[3, 1:7] = 1
    owner[4:6, 4] = 1
    points = annotations.keypoints(owner, 0, (4, 3))
    assert points == [4, 3, 2, 4, 2, 2, 4, 5, 2, 1, 3, 2, 6, 3, 2]
    owner[3, 4] = 2  # A later object covers the centre, and not the extremes.
    assert annotations.keypoints(owner, 0, (4, 3)) == [4, 3, 1, *points[3:]]
    assert annotations.keypoints(owner, 1, (4, 3)) == [4, 3, 2] * 5  # An earlier one does not.


def test_an_invisible_object_keeps_its_box(tmp_path, monkeypatch):
    drawn = shapes.draw_image(HIDDEN)
    _, owner, objects = drawn
    assert not (owner == 1).any() and len(objects) > 1
    first = annotations.instances(owner, objects)[0]
    assert first["keypoints"] == [*objects[0].center, 1] + [0] * 12
    assert not polygons_to_bitmask(first["segmentation"], *owner.shape).any()
    ids = [s["id"] for s in annotations.segments(owner, objects, shapes.BACKGROUND)]
    assert ids == [1, *range(3, len(objects) + 2)]

    monkeypatch.setattr(shapes, "draw_image", lambda seed: drawn)
    shapes.write_split(str(tmp_path), "train", 1)
    records = load_coco_json(str(tmp_path / "instances_train.json"), str(tmp_path / "train"))
    mapper = DatasetMapper(shapes_cfg("vanilla", "MODEL.MASK_ON", True), True, augmentations=[])
    found = mapper(records[0])["instances"]
    boxes = [[x, y, x + w, y + h] for _, (x, y, w, h), _ in objects]
    assert found.gt_boxes.tensor.tolist() == boxes and len(found.gt_masks) == len(boxes)
