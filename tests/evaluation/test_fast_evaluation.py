"""COCO's metric by compiled code: equal to pycocotools' to the last bit."""

import copy
import io
import json
from contextlib import redirect_stdout

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from conftest import shapes_cfg
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from ssimkd.evaluation import evaluators as evaluation

pytest.importorskip("ultrafast_pycocotools")

NAME = "ssimkd_test_fast_evaluation"
SIZE = 256  # pixels
CLASSES, POINTS = 3, 17


def shape_of(box):
    x, y, w, h = (float(v) for v in box)
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h / 2]
    return {"bbox": [x, y, w, h], "segmentation": [polygon], "area": 0.75 * w * h}


def random_boxes(rng, count):
    side = rng.integers(4, 200, (count, 2))
    return np.concatenate([rng.integers(0, SIZE - side), side], 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A registered data set of 15 images with boxes, masks and keypoints; some are crowds."""
    rng = np.random.default_rng(0)
    annotations = []
    for image in range(15):
        for box in random_boxes(rng, rng.integers(0, 6)):
            crowd = bool(rng.random() < 0.1)
            points = np.concatenate(
                [rng.integers(0, SIZE, (POINTS, 2)), np.full((POINTS, 1), 2)], 1
            )
            one = dict(shape_of(box), image_id=image, id=len(annotations) + 1, iscrowd=int(crowd))
            if crowd:
                rle = mask_util.frPyObjects(one["segmentation"], SIZE, SIZE)
                one["segmentation"] = dict(rle[0], counts=rle[0]["counts"].decode())
            one.update(category_id=int(rng.integers(1, CLASSES + 1)), num_keypoints=POINTS)
            annotations.append(dict(one, keypoints=points.flatten().tolist()))
    path = tmp_path_factory.mktemp("coco") / "data.json"
    path.write_text(
        json.dumps(
            {
                "info": {},
                "images": [{"id": i, "width": SIZE, "height": SIZE} for i in range(15)],
                "annotations": annotations,
                "categories": [{"id": i, "name": str(i)} for i in range(1, CLASSES + 1)],
            }
        )
    )
    meta = MetadataCatalog.get(NAME)
    meta.set(
        json_file=str(path),
        evaluator_type="coco",
        thing_classes=["1", "2", "3"],
        thing_dataset_id_to_contiguous_id={1: 0, 2: 1, 3: 2},
    )
    DatasetCatalog.register(NAME, list)
    yield annotations
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME)


def detections(annotations):
    """What a fair detector finds, with equal scores among it and an image without any."""
    rng = np.random.default_rng(1)
    for image in range(14):
        true = [a for a in annotations if a["image_id"] == image]
        boxes = [np.array(a["bbox"]) + rng.integers(-3, 4, 4) for a in true for _ in range(2)]
        boxes = np.array([*boxes, *random_boxes(rng, 5)], dtype=np.float32)
        boxes[:, 2:] = boxes[:, 2:].clip(1)
        found = Instances((SIZE, SIZE))
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        found.pred_boxes = Boxes(torch.from_numpy(corners))
        found.scores = torch.from_numpy(rng.integers(1, 8, len(boxes)) / 8)
        classes = [a["category_id"] - 1 for a in true for _ in range(2)]
        found.pred_classes = torch.tensor([*classes, *rng.integers(0, CLASSES, 5)])
        masks = [mask_util.frPyObjects(shape_of(b)["segmentation"], SIZE, SIZE)[0] for b in boxes]
        found.pred_masks = torch.from_numpy(mask_util.decode(masks)).permute(2, 0, 1).bool()
        points = [a["keypoints"] for a in true for _ in range(2)]
        points += rng.integers(0, SIZE, (5, POINTS * 3)).tolist()
        keypoints = torch.tensor(points, dtype=torch.float32).view(-1, POINTS, 3)
        found.pred_keypoints = keypoints + torch.from_numpy(rng.normal(0, 2, keypoints.shape))
        yield [{"image_id": image}], [{"instances": found}]


def results(evaluator, annotations):
    evaluator.reset()
    for inputs, outputs in detections(annotations):
        evaluator.process(inputs, copy.deepcopy(outputs))
    printed = io.StringIO()
    with redirect_stdout(printed):
        found = evaluator.evaluate()
    lines = [line for line in printed.getvalue().splitlines() if line.startswith(" Average")]
    return found, lines


def test_every_metric_is_pycocotools_own(data, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "has_compiled_ops", lambda: False)
    fast = evaluation.build_evaluator(shapes_cfg("vanilla", "OUTPUT_DIR", str(tmp_path)), NAME)
    assert type(fast) is evaluation.FastCOCOEvaluator
    slow = COCOEvaluator(NAME, use_fast_impl=False, kpt_oks_sigmas=())
    found, expected = results(fast, data), results(slow, data)
    assert found == expected  # dicts of floats: equal bits
    assert set(found[0]) == {"bbox", "segm", "keypoints"}
    assert 5 < found[0]["bbox"]["AP"] < 95 and 5 < found[0]["segm"]["APm"] < 95
    assert results(slow, data) == expected  # nothing stays changed


def test_yaml_and_lazy_configs_choose_alike(data, monkeypatch):
    for compiled, expected in ((True, COCOEvaluator), (False, evaluation.FastCOCOEvaluator)):
        monkeypatch.setattr(evaluation, "has_compiled_ops", lambda compiled=compiled: compiled)
        lazy = evaluation.build_lazy_evaluator(L(COCOEvaluator)(dataset_name=NAME), "")
        yaml = evaluation.build_evaluator(shapes_cfg("vanilla"), NAME)
        assert type(lazy) is type(yaml) is expected
        monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
        assert evaluation.coco_class(compiled) is COCOEvaluator
        monkeypatch.undo()


def test_an_annotation_of_id_0_can_be_matched():
    """Where pycocotools loses it: its arrays of matches say 0 for none."""
    import ultrafast_pycocotools as fast
    from pycocotools import coco, cocoeval

    one = {"id": 0, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
    truth = {"info": {}, "images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [one]}
    found = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1.0}]
    precisions = []
    with redirect_stdout(io.StringIO()):
        slow = coco.COCO()
        slow.dataset = truth
        slow.createIndex()
        for data, metric in ((slow, cocoeval), (fast.COCO(truth, verbose=False), fast)):
            run = metric.COCOeval(data, data.loadRes(found), "bbox")
            run.evaluate()
            run.accumulate()
            precisions.append(np.asarray(run.eval["precision"])[:, :, 0, 0, 2].mean())
    assert precisions == pytest.approx([0, 1])
