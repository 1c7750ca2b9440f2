"""The command that draws detections: what a user gets, and what it refuses."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, save_teacher, shapes_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ssimkd.checkpoint.export import export_student
from ssimkd.checkpoint.reader import read_weights
from ssimkd.commands import export, predict
from ssimkd.engine.arguments import load_config
from ssimkd.engine.run_record import describe_run
from ssimkd.errors import ConfigError
from ssimkd.evaluation.predictor import (
    draw_detections,
    image_reader,
    load_detector,
    metadata_of,
)
from ssimkd.utils.random_state import get_random_state

TEACHER = ("configs/shapes/teacher.yaml", "configs/shapes/teacher.pth")


@pytest.fixture
def images(few_shapes):
    return [f"{few_shapes}/ssimkd_shapes/val/{number:06d}.jpg" for number in range(2)]


def run(*args):
    predict.main([str(arg) for arg in args])


def xyxy(entry):
    x, y, w, h = entry["bbox"]
    return [x, y, x + w, y + h]


def test_it_lists_and_draws_what_detectron2_finds(images, tmp_path):
    """As a user runs it; DefaultPredictor is the reference."""
    config, weights = TEACHER
    command = [sys.executable, "-m", "ssimkd", "predict", "--config", config]
    command += ["--weights", weights, *images]
    command += ["--output", str(tmp_path), "--confidence-threshold", "0.7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "predictions.json").read_text())
    last = f"{len(found)} objects in 2 images: {tmp_path}/predictions.json"
    assert done.stdout.splitlines()[-1] == last
    predictor = DefaultPredictor(shapes_cfg("teacher", "MODEL.WEIGHTS", weights))
    for path in images:
        image = cv2.imread(path)
        expected = predictor(image)["instances"]
        expected = expected[expected.scores >= 0.7]
        own = [entry for entry in found if entry["file_name"] == path]
        assert len(own) == len(expected) > 0
        boxes = torch.tensor([xyxy(entry) for entry in own])
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor)
        classes = ["disk", "ring", "triangle", "cross"]
        assert [classes.index(entry["category_name"]) for entry in own] == [
            entry["category_id"] - 1 for entry in own
        ] == expected.pred_classes.tolist()  # fmt: skip
        drawn = cv2.imread(str(tmp_path / path.split("/")[-1]))
        assert min(drawn.shape[:2]) == 480
        large = cv2.resize(image, drawn.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        assert (np.abs(drawn.astype(int) - large).sum(2) > 60).mean() > 0.01


def test_a_lazy_student(images, tmp_path):
    """A checkpoint of a distilled run gives the same through its lazy config and its YAML twin."""
    path = save_teacher(
        shapes_cfg("ssimkd", "MODEL.DISTILL.ADAPTER", "conv1x1"), tmp_path / "s.pth"
    )
    found = []
    for config in ("tests/engine/lazy_shapes.py", "configs/shapes/ssimkd.yaml"):
        out = tmp_path / config.replace("/", "_")
        args = ["--config-file", config, *images, "--weights", path, "--output", out]
        run(*args, "--confidence-threshold", 0)
        found.append(json.loads((out / "predictions.json").read_text()))
    assert found[0] == found[1] and len(found[0]) > 100


def test_an_exported_student_needs_no_weights_named(images, tmp_path):
    cfg = shapes_cfg("teacher")
    _, config = export_student(cfg, read_weights(TEACHER[1]), str(tmp_path))
    own_data = ["--opts", "DATASETS.TEST", "()", "DATASETS.TRAIN", "()"]
    args = ["--config", config, *images, "--output", tmp_path / "seen", *own_data]
    run(*args)
    found = json.loads((tmp_path / "seen/predictions.json").read_text())
    # without a test set nobody knows the names that this file does not hold
    assert found and {entry["category_name"] for entry in found} <= set("0123")
    assert {entry["image_id"] for entry in found} <= {"000000.jpg", "000001.jpg"}


@pytest.fixture
def own_config(few_shapes, tmp_path):
    """A config of one's own data, whose category ids have gaps; returns it and its json."""
    root = f"{few_shapes}/ssimkd_shapes"
    with open(f"{root}/instances_val.json") as f:
        content = json.load(f)
    for entries, key in (("categories", "id"), ("annotations", "category_id")):
        for entry in content[entries]:
            entry[key] = 10 * entry[key] + 1
    (tmp_path / "own.json").write_text(json.dumps(content))
    entry = {"NAME": "own_ids", "JSON": str(tmp_path / "own.json"), "IMAGES": f"{root}/val"}
    data = {"COCO": [entry], "TRAIN": ["own_ids"], "TEST": ["own_ids"]}
    config = {"_BASE_": str(ROOT / TEACHER[0]), "DATASETS": {**data, "NUM_CLASSES_FROM_DATA": True}}
    (tmp_path / "own.yaml").write_text(yaml.dump(config))
    yield str(tmp_path / "own.yaml"), tmp_path / "own.json"
    if "own_ids" in DatasetCatalog:
        DatasetCatalog.remove("own_ids")
        MetadataCatalog.remove("own_ids")


def test_predictions_are_cocos_results_with_the_ids_of_the_json(own_config, images, tmp_path):
    config, json_file = own_config
    run("--config", config, "--weights", TEACHER[1], *images, "--output", tmp_path / "seen")
    truth = COCO(str(json_file))
    results = truth.loadRes(str(tmp_path / "seen/predictions.json"))
    metric = COCOeval(truth, results, "bbox")
    metric.params.imgIds = [image["id"] for image in truth.dataset["images"][:2]]
    metric.evaluate(), metric.accumulate(), metric.summarize()
    assert metric.stats[1] > 0.5  # AP50 of a trained detector


def test_names_travel_with_an_export_that_is_moved_and_needs_no_data(own_config, images, tmp_path):
    config, json_file = own_config
    cfg = load_config(config, [])
    run_of = describe_run(cfg, torch.nn.Identity())
    weights = tmp_path / "model_0000009.pth"
    torch.save({"model": read_weights(TEACHER[1]), "run": run_of}, weights)
    json_file.unlink()
    words = ["--config", config, "--weights", str(weights)]
    export.main([*words, "--out", str(tmp_path / "first")])
    (tmp_path / "first").rename(tmp_path / "moved")
    found = []
    student = ["--config", tmp_path / "moved/student.yaml"]
    for number, named in enumerate((student, words)):
        run(*named, images[0], "--output", tmp_path / f"seen{number}")
        found.append(json.loads((tmp_path / f"seen{number}/predictions.json").read_text()))
    assert found[0] == found[1] != []
    names = {"disk": 11, "ring": 21, "triangle": 31, "cross": 41}
    assert all(names[entry["category_name"]] == entry["category_id"] for entry in found[0])
    assert str(tmp_path) not in (tmp_path / "moved/student.yaml").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": ["{out}/a.jpg"]}, "a.jpg would be overwritten"),
        ({"images": ["{out}/a.jpg", "{out}/b/a.jpg"], "output": "{out}/c"}, "have the same name"),
        ({"weights": ""}, "--weights: name the detector's checkpoint"),
        ({"weights": "none.pth"}, "--weights: none.pth cannot be read"),
        ({"opts": ["MODEL.ROI_HEADS.NUM_CLASSES", "5"]}, "does not hold roi_heads.box_predictor"),
    ],
)
def test_what_it_refuses(images, tmp_path, change, message):
    (tmp_path / "b").mkdir()
    for name in ("a.jpg", "b/a.jpg"):
        shutil.copy(images[0], tmp_path / name)
    args = {"images": images, "output": "{out}", "config_file": TEACHER[0], "weights": TEACHER[1]}
    args = {"opts": [], "confidence_threshold": 0.5, **args, **change}
    args["images"] = [path.format(out=tmp_path) for path in args["images"]]
    for key in ("output", "config_file"):
        args[key] = args[key].format(out=tmp_path)
    before = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(ConfigError, match=message):
        predict.predict(Namespace(**args))
    assert (tmp_path / "a.jpg").read_bytes() == before


def test_unreadable_images_are_reported_and_the_others_predicted(images, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_text("no image")
    with open(images[0], "rb") as image:  # OpenCV writes no file with this suffix
        (tmp_path / "copy.jfif").write_bytes(image.read())
    words = ["--config", TEACHER[0], "--weights", TEACHER[1], "nowhere.jpg", images[0]]
    with pytest.raises(SystemExit) as stopped:
        more = tmp_path / "bad.jpg", tmp_path / "copy.jfif", images[1]
        run(*words, *more, "--output", tmp_path / "seen")
    first, second, third = stopped.value.code.splitlines()  # a text: status 1
    assert first.startswith("error: nowhere.jpg cannot be read as an image")
    assert second.startswith(f"error: {tmp_path}/bad.jpg cannot be read as an image")
    found = json.loads((tmp_path / "seen/predictions.json").read_text())
    assert third == f"error: --output: cannot write {tmp_path}/seen/copy.jfif"
    listed = {entry["file_name"] for entry in found}
    assert listed == {*images, str(tmp_path / "copy.jfif")}
    assert "objects in 3 images" in capsys.readouterr().out


def test_nothing_above_the_threshold_says_how_close_it_was(images, tmp_path, capsys):
    words = ["--config", TEACHER[0], "--weights", TEACHER[1], images[0], "--output", tmp_path]
    run(*words, "--confidence-threshold", 1)
    said = capsys.readouterr().out.splitlines()
    assert 0.5 < float(said[-2].split("The best score is ")[1].split(",")[0]) <= 1
    with pytest.raises(SystemExit, match="2"):
        run(*words, "--confidence-threshold", 1.5)
    assert "--confidence-threshold: must be from 0 to 1, got 1.5" in capsys.readouterr().err


def test_drawings_are_the_same_each_time_and_leave_the_generators_alone(images):
    cfg = shapes_cfg("teacher")
    model = load_detector(cfg, TEACHER[1])
    found = model([image_reader(cfg)(images[0])])[0]["instances"]
    before = get_random_state()["numpy"][1]
    first, second = (draw_detections(images[0], found, metadata_of(cfg, [])) for _ in range(2))
    assert np.array_equal(first, second) and min(first.shape[:2]) == 480
    assert torch.equal(get_random_state()["numpy"][1], before)
