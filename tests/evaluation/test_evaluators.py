"""The data set determines its metrics, in both kinds of config."""

import json

import pytest
from conftest import shapes_cfg
from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
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
