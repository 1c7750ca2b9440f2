"""The data set determines its metrics, in both kinds of config."""

import json

import pytest
import torch
from conftest import shapes_cfg
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from ssimkd import ConfigError
from ssimkd.evaluation.evaluators import build_evaluator, build_lazy_evaluator, save_results


def test_the_data_set_chooses_its_metrics():
    evaluator = build_evaluator(shapes_cfg("vanilla"), "voc_2007_test")
    assert isinstance(evaluator, PascalVOCDetectionEvaluator)


def test_panoptic_data_has_three_metrics(tmp_path, monkeypatch, caplog):
    cfg = shapes_cfg("vanilla", "OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kinds = [type(e) for e in build_evaluator(cfg, "ssimkd_shapes_panoptic_val")._evaluators]
    assert kinds == [SemSegEvaluator, COCOEvaluator]
    assert "panopticapi is not installed" in caplog.text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    kinds = [type(e) for e in build_evaluator(cfg, "ssimkd_shapes_panoptic_val")._evaluators]
    assert kinds == [SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator]


def test_a_list_of_lazy_evaluators(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name = "ssimkd_shapes_panoptic_val"
    nodes = [
        L(COCOEvaluator)(dataset_name=name),
        L(SemSegEvaluator)(dataset_name="${..0.dataset_name}"),
        L(COCOPanopticEvaluator)(dataset_name=name),
    ]
    cfg = OmegaConf.create({"evaluator": nodes}, flags={"allow_objects": True})
    evaluator = build_lazy_evaluator(cfg.evaluator, str(tmp_path))
    coco, sem_seg = evaluator._evaluators  # without panopticapi no third
    assert coco._output_dir == str(tmp_path) and sem_seg._dataset_name == name
    single = build_lazy_evaluator(cfg.evaluator[0], str(tmp_path))
    assert isinstance(single, COCOEvaluator)


def test_an_unknown_kind_of_data_is_named():
    MetadataCatalog.get("odd_val").evaluator_type = "odd"
    with pytest.raises(ConfigError, match="odd_val has the evaluator_type 'odd'; known are coco"):
        build_evaluator(shapes_cfg("vanilla"), "odd_val")


def test_a_metric_without_objects_is_null_in_the_results(tmp_path):
    save_results({"bbox": {"AP": 12.5, "APl": float("nan")}}, str(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == {"bbox": {"AP": 12.5, "APl": None}}


@pytest.mark.parametrize("ids", [(0, 1), ("a", "b"), (7, 9)])
def test_annotations_of_any_ids_are_found(tmp_path, ids):
    """COCO's metric itself takes the id 0 for no match, and fails for text."""
    boxes = [[4, 4, 40, 40], [50, 50, 30, 30]]
    keys = ("id", "image_id", "category_id", "iscrowd", "bbox", "area")
    rows = [(i, 1, 3, 0, box, box[2] * box[3]) for i, box in zip(ids, boxes)]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 96, "width": 96}],
        "annotations": [dict(zip(keys, row)) for row in rows],
        "categories": [{"id": 3, "name": "crack"}],
    }
    (tmp_path / "own.json").write_text(json.dumps(content))
    name = f"ids_{ids[0]}"
    register_coco_instances(name, {}, str(tmp_path / "own.json"), str(tmp_path))
    DatasetCatalog.get(name)  # sets the ids of the categories
    evaluator = build_evaluator(shapes_cfg("vanilla", "OUTPUT_DIR", str(tmp_path)), name)
    found = Instances((96, 96))
    found.pred_boxes = Boxes(torch.tensor([[4.0, 4, 44, 44], [50, 50, 80, 80]]))
    found.scores, found.pred_classes = torch.tensor([0.9, 0.8]), torch.tensor([0, 0])
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
