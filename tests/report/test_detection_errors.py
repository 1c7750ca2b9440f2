"""TIDE's error types against a second, literal reading of the paper, and AP against pycocotools."""

import contextlib
import copy
import io

import numpy as np
import pytest
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


# A second reading of the paper: loops over dicts, errors mended in the data, pycocotools' AP.


def iou(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def nearest(d, objects):
    """The best overlap of a detection with some objects, and the object."""
    found = [(iou(o["bbox"], d["bbox"]), o) for o in objects]
    return max(found, key=lambda pair: pair[0], default=(0, None))


def kind_of(d, here):
    own = [o for o in here if o["category_id"] == d["category_id"]]
    other = [o for o in here if o["category_id"] != d["category_id"]]
    (free, taken), (right, place), (wrong, label) = (
        nearest(d, some) for some in ([o for o in own if "taken" not in o], own, other)
    )
    if free >= 0.5:
        taken["taken"] = True
        return "", None
    if 0.1 <= right < 0.5:
        return "localisation", place
    if wrong >= 0.5:
        return "classification", label
    if right >= 0.5:
        return "duplicate", None
    return ("background" if max(right, wrong) <= 0.1 else "both"), None


def classify(objects, detections):
    """Marks "kind" and "target" of detections, "taken", "fix" and "missed" of objects, in place."""
    by_score = sorted(detections, key=lambda d: -d["score"])
    for d in by_score:
        here = [o for o in objects if o["image_id"] == d["image_id"]]
        d["kind"], d["target"] = kind_of(d, here)
    for d in by_score:
        if d["target"] is not None and "taken" not in d["target"]:
            d["target"].setdefault("fix", d)
    for o in objects:
        o["missed"] = "taken" not in o and "fix" not in o


def mended(kind, objects, detections):
    """The data in which every error of a kind is put right."""
    kept = []
    for d in detections:
        if d["kind"] != kind:
            kept.append(d)
        elif d["target"] is not None and d["target"].get("fix") is d:
            o = d["target"]
            kept.append({**d, "bbox": o["bbox"], "category_id": o["category_id"]})
    return [o for o in objects if not (kind == "missed" and o["missed"])], kept


def coco_ap50(objects, detections, classes):
    """pycocotools' AP at 0.5; a class of `classes` without objects counts 0."""
    keys = ("image_id", "category_id", "bbox", "iscrowd", "score")
    plain = [{k: r[k] for k in keys if k in r} for r in objects]
    truth, images = COCO(), {r["image_id"] for r in [*objects, *detections]}
    for number, o in enumerate(plain, start=1):
        o.update(id=number, area=o["bbox"][2] * o["bbox"][3])
    truth.dataset = {
        "images": [{"id": i} for i in images],
        "categories": [{"id": c} for c in classes],
        "annotations": plain,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes([{k: r[k] for k in keys if k in r} for r in detections])
        judge = COCOeval(truth, found, "bbox")
        judge.params.iouThrs = np.array([0.5])
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][0, :, :, 0, -1]  # recalls x classes
    return 100 * float(np.where(precision < 0, 0, precision).mean())


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


@pytest.mark.parametrize("seed", range(3))
def test_counts_and_costs_agree_with_a_second_reading(seed):
    objects, detections = scene(seed)
    errors = detection_errors(copy.deepcopy(objects), copy.deepcopy(detections))
    classes = sorted({o["category_id"] for o in objects})
    expected = coco_ap50(objects, detections, classes)
    assert errors.ap50 == pytest.approx(expected, abs=1e-9)
    classify(objects, detections)
    for kind in KINDS:
        wrong = [o["missed"] for o in objects] if kind == "missed" else [
            d["kind"] == kind for d in detections
        ]  # fmt: skip
        assert errors.counts[kind] == sum(wrong) > 0, kind
        gain = coco_ap50(*mended(kind, objects, detections), classes) - expected
        assert errors.costs[kind] == pytest.approx(max(gain, 0), abs=1e-9), kind
