"""TIDE's kinds of errors in cases worked out by hand, and AP against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ssimkd.report.detection_errors import KINDS, detection_errors


def object_(box, category=1, image=1, **more):
    return {"image_id": image, "category_id": category, "bbox": list(box), "iscrowd": 0, **more}


def detection(box, score, category=1, image=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


BOX, HALF, FAR = (0, 0, 10, 10), (0, 0, 10, 4), (50, 50, 10, 10)  # HALF overlaps BOX by 0.4


@pytest.mark.parametrize(
    ("kind", "wrong", "ap", "mended"),
    [
        # one object, one detection that takes none: AP 0, and 100 once it takes it
        ("localisation", [detection(HALF, 0.9)], 0, 100),
        ("classification", [detection(BOX, 0.9, category=2)], 0, 100),
        # none of the detections could take the object: nothing is won
        ("both", [detection(HALF, 0.9, category=2)], 0, 0),
        ("background", [detection(FAR, 0.9)], 0, 0),
        # the better one of two right ones is first in precision anyhow
        ("duplicate", [detection(BOX, 0.9), detection(BOX, 0.8)], 100, 100),
        # without the object that nothing found there is no object of its class
        ("missed", [], 0, 0),
    ],
)
def test_one_error_of_each_kind(kind, wrong, ap, mended):
    errors = detection_errors([object_(BOX)], wrong)
    also = {"missed"} if kind in ("both", "background") else set()
    assert {k for k, n in errors.counts.items() if n} == {kind} | also
    assert errors.ap50 == ap and errors.costs[kind] == mended - ap


def test_a_category_may_have_the_id_0():
    errors = detection_errors([object_(BOX, category=0)], [detection(HALF, 0.9, category=0)])
    assert errors.ap50 == 0 and errors.costs["localisation"] == 100


def test_a_class_that_is_missed_as_a_whole_does_not_count_once_it_is_corrected():
    objects = [object_(BOX), object_(FAR, category=2)]
    errors = detection_errors(objects, [detection(BOX, 0.9)])
    assert errors.ap50 == 50 and errors.costs["missed"] == 50


def test_a_false_detection_above_a_right_one_costs_half():
    for wrong in (detection(FAR, 0.9), detection(HALF, 0.9, category=2)):
        objects = [object_(BOX), object_(FAR, category=2, image=2)]
        found = [wrong, detection(BOX, 0.5), detection(FAR, 0.5, category=2, image=2)]
        errors = detection_errors(objects, found)
        kind = "background" if wrong["category_id"] == 1 else "both"
        assert errors.counts[kind] == 1 and errors.ap50 == 75  # precision 1/2 in one class of two
        assert errors.costs[kind] == 25


def test_an_object_counts_once_however_many_could_take_it():
    found = [detection(HALF, 0.9), detection(HALF, 0.8), detection(BOX, 0.7, category=2)]
    errors = detection_errors([object_(BOX)], found)
    assert errors.counts["localisation"] == 2 and errors.counts["classification"] == 1
    assert errors.costs["localisation"] == 100  # the second one vanishes
    assert errors.costs["classification"] == 0  # a better candidate has the object


def test_a_detection_in_a_crowd_is_no_error():
    crowd = object_((0, 0, 100, 100), iscrowd=1)
    errors = detection_errors([crowd, object_(FAR, image=2)], [detection(FAR, 0.9)])
    assert [k for k, n in errors.counts.items() if n] == ["missed"]


def test_nothing_at_all():
    errors = detection_errors([], [])
    assert errors.ap50 == 0 and not any(errors.counts.values()) and not any(errors.costs.values())


def coco_ap50(objects, detections):
    """pycocotools' AP at an overlap of 0.5."""
    truth, images = COCO(), {r["image_id"] for r in [*objects, *detections]}
    truth.dataset = {
        "images": [{"id": i} for i in images],
        "categories": [{"id": c} for c in (1, 2, 3)],
        "annotations": [{**o, "id": i, "area": 1} for i, o in enumerate(objects, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(detections)
        judge = COCOeval(truth, found, "bbox")
        judge.params.iouThrs = np.array([0.5])
        judge.evaluate()
        judge.accumulate()
    return 100 * judge.eval["precision"][0, :, :, 0, -1].mean()


def scene(seed):
    """Random objects, and detections that are some of them moved, of another class, or anywhere."""
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for image in range(1, 41):
        for _ in range(rng.integers(0, 5)):
            box = [*rng.uniform(0, 60, 2), *rng.uniform(10, 40, 2)]
            category = int(rng.integers(1, 4))
            objects.append(object_(box, category, image))
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.normal(0, rng.choice([1, 6, 15]), 4)
                moved[2:] = np.maximum(moved[2:], 3)
                guess = category if rng.random() < 0.7 else int(rng.integers(1, 4))
                detections.append(detection(moved, float(rng.random()), guess, image))
        anywhere = [*rng.uniform(0, 80, 2), *rng.uniform(5, 30, 2)]
        detections.append(detection(anywhere, float(rng.random()), int(rng.integers(1, 4)), image))
    return objects, detections


def test_ap_is_that_of_pycocotools_and_every_detection_is_right_or_one_error():
    objects, detections = scene(0)
    errors = detection_errors(objects, detections)
    assert errors.ap50 == pytest.approx(coco_ap50(objects, detections), abs=1e-9)
    assert all(errors.counts[kind] > 0 for kind in KINDS)
    assert all(0 <= cost <= 100 - errors.ap50 for cost in errors.costs.values())
    # without its background errors a detector has no such errors, and gains their cost
    anywhere = [d for d in detections if not nearby(d, objects)]
    assert len(anywhere) == errors.counts["background"]
    rest = [d for d in detections if nearby(d, objects)]
    gain = coco_ap50(objects, rest) - errors.ap50
    assert gain == pytest.approx(errors.costs["background"], abs=1e-9)


def nearby(found, objects):
    """Whether a detection overlaps an object by more than 0.1."""
    here = [o["bbox"] for o in objects if o["image_id"] == found["image_id"]]
    return bool(here) and mask.iou([found["bbox"]], here, [0] * len(here)).max() > 0.1
