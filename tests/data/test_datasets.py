"""A user's own data: registered from the config, its classes counted and checked."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from conftest import zoo_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from ssimkd import ConfigError
from ssimkd.data.datasets import (
    build_mapper,
    categories_of,
    check_classes,
    check_datasets,
    count_classes,
    image_ids_of,
    register_coco,
    use_own_data,
)
from ssimkd.engine.arguments import load_config

KEY = "DATASETS.COCO"
CLASSES = ["crack", "hole"]


@pytest.fixture
def own(tmp_path):
    """An entry of DATASETS.COCO with two classes, whose ids are neither sorted nor contiguous."""
    categories = [{"id": 7, "name": "hole"}, {"id": 3, "name": "crack"}]
    images = [{"id": 1, "file_name": "a.jpg", "height": 96, "width": 96}]
    box = dict(image_id=1, bbox=[1, 2, 30, 40], area=1200, iscrowd=0)
    boxes = [dict(box, id=i, category_id=c) for i, c in ((1, 3), (2, 7))]
    (tmp_path / "a.jpg").write_bytes(b"")
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    yield {"NAME": "own_train", "JSON": str(path), "IMAGES": str(tmp_path)}
    if "own_train" in DatasetCatalog:
        DatasetCatalog.remove("own_train")
        MetadataCatalog.remove("own_train")


def test_the_json_names_the_classes(own):
    register_coco([own], ["own_train"])
    again = {**own, "IMAGES": f"{own['IMAGES']}/."}  # the same folder in other words
    register_coco([again], ["own_train"])  # The second call changes nothing.
    assert MetadataCatalog.get("own_train").thing_classes == CLASSES
    (record,) = DatasetCatalog.get("own_train")
    assert [a["category_id"] for a in record["annotations"]] == [0, 1]
    assert record["file_name"] == f"{own['IMAGES']}/a.jpg"


@pytest.mark.parametrize("from_data", [False, True])
def test_a_yaml_config_registers_and_counts(own, from_data):
    opts = [KEY, str([own]), "DATASETS.TRAIN", "('own_train',)"]
    opts += ["DATASETS.NUM_CLASSES_FROM_DATA", str(from_data)]
    cfg = load_config("configs/shapes/vanilla.yaml", opts)
    assert (2 if from_data else 4) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert (2 if from_data else 80) == cfg.MODEL.RETINANET.NUM_CLASSES
    message = "TRAIN: own_train has 2 thing classes and the head has 4: set MODEL.ROI"
    with nullcontext() if from_data else pytest.raises(ConfigError, match=message):
        check_classes(build_model(cfg), {"DATASETS.TRAIN": cfg.DATASETS.TRAIN})


def test_a_lazy_config_registers_and_counts(own):
    entry = ",".join(f"{key.lower()}:'{value}'" for key, value in own.items())
    overrides = [
        f"+datasets.coco=[{{{entry}}}]",
        "+datasets.num_classes_from_data=True",
        "dataloader.train.dataset.names=own_train",
    ]
    assert load_config("ssimkd_R50.py", overrides).model.roi_heads.num_classes == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"JSON": "no.json"}, f"{KEY}: own_train: no.json cannot be read: FileNotFoundError"),
        ({"IMAGES": "nowhere"}, f"{KEY}: own_train: there is no folder nowhere"),
        (
            {"CLASSES": ["a"]},
            f"{KEY}: an entry is a mapping of NAME, IMAGES and, with labels, JSON",
        ),
        ({"JSON": "list.json"}, "list.json has no list 'images'"),
        ({"NAME": "ssimkd_shapes_train"}, "another data set is called ssimkd_shapes_train"),
    ],
)
def test_wrong_entries_are_named(own, change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match=message) as error:
        register_coco([{**own, **change}], [change.get("NAME", "own_train")])
    assert len(str(error.value).splitlines()) == 1


def test_data_that_a_run_does_not_use_is_not_read(own):
    missing = {"NAME": "own_missing", "JSON": "no.json", "IMAGES": "nowhere"}
    opts = [KEY, str([own, missing]), "DATASETS.TRAIN", "('own_missing',)"]
    opts += ["DATASETS.TEST", "('own_train',)", "DATASETS.NUM_CLASSES_FROM_DATA", "True"]
    with pytest.raises(ConfigError, match="own_missing: there is no folder nowhere"):
        load_config("configs/shapes/vanilla.yaml", opts)
    cfg = load_config("configs/shapes/vanilla.yaml", opts, splits=("TEST",))  # --eval-only
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2


def test_a_json_without_annotations_may_be_used_without_labels(own, tmp_path):
    content = json.loads(open(own["JSON"]).read())
    (tmp_path / "images.json").write_text(json.dumps({"images": content["images"]}))
    unlabeled = {**own, "JSON": str(tmp_path / "images.json")}
    register_coco([unlabeled], [], unlabeled=["own_train"])
    (record,) = DatasetCatalog.get("own_train")
    assert record["file_name"] == f"{own['IMAGES']}/a.jpg" and "annotations" not in record
    assert (record["height"], record["width"], record["image_id"]) == (96, 96, 1)
    check_datasets(["own_train"], "DATASETS.UNLABELED")
    with pytest.raises(ConfigError, match="images.json has no list 'annotations'"):
        register_coco([unlabeled], ["own_train"])


def test_data_that_was_used_without_labels_gets_them_when_they_are_used(own):
    register_coco([own], [], unlabeled=["own_train"])
    assert not MetadataCatalog.get("own_train").get("thing_classes")
    register_coco([own], ["own_train"])  # as the data of the teacher
    assert MetadataCatalog.get("own_train").thing_classes == CLASSES
    assert DatasetCatalog.get("own_train")[0]["annotations"]


def test_the_same_ids_must_have_the_same_names(own):
    register_coco([own], ["own_train"])
    MetadataCatalog.get("own_other").thing_classes = CLASSES[::-1]
    data = {"DATASETS.TRAIN": ["own_train"], "DATASETS.TEST": ["own_other"]}
    model = SimpleNamespace(num_classes=2)
    message = "TEST: own_other has the class 'hole' where own_train has 'crack'"
    with pytest.raises(ConfigError, match=message):
        check_classes(model, data)
    MetadataCatalog.remove("own_other")


def test_stuff_classes_are_checked_as_well():
    name = "ssimkd_shapes_panoptic_train"
    cfg = zoo_cfg("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    message = f"{name} has 2 stuff classes and the head has 54: set MODEL.SEM_SEG_HEAD.NUM_CLASSES"
    with pytest.raises(ConfigError, match=message):
        check_classes(build_model(cfg), {"DATASETS.TRAIN": [name]})
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 2
    check_classes(build_model(cfg), {"DATASETS.TRAIN": [name]})


def test_an_image_of_several_test_sets_has_its_id_in_the_first(own, tmp_path):
    content = json.loads(open(own["JSON"]).read())
    for entry, key in (
        (content["images"][0], "id"),
        *((a, "image_id") for a in content["annotations"]),
    ):
        entry[key] = 5
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    other = {**own, "NAME": "own_val", "JSON": str(path)}
    opts = [KEY, str([own, other]), "DATASETS.TEST", "('own_train', 'own_val')"]
    cfg = load_config("configs/shapes/vanilla.yaml", opts, ("TEST",))
    assert image_ids_of(cfg) == {str(tmp_path / "a.jpg"): 1}
    DatasetCatalog.remove("own_val")
    MetadataCatalog.remove("own_val")


def test_a_lazy_config_without_roi_heads_has_its_classes_counted():
    names = {"dataset": {"names": "ssimkd_shapes_train"}}
    datasets = {"num_classes_from_data": True}
    cfg = OmegaConf.create(
        {"datasets": datasets, "dataloader": {"train": names}, "model": {"num_classes": 80}}
    )
    use_own_data(cfg, ("TRAIN",))
    assert cfg.model.num_classes == 4


def test_a_wrong_key_of_a_lazy_config_is_named():
    with pytest.raises(ConfigError, match="datasets: there are the keys coco, num_classes_from"):
        use_own_data(OmegaConf.create({"datasets": {"cocoo": []}}), ("TRAIN",))
    with pytest.raises(ConfigError, match="^datasets.coco: an entry is a mapping"):
        use_own_data(OmegaConf.create({"datasets": {"coco": [{"title": "a"}]}}), ("TRAIN",))


@pytest.mark.parametrize("names, message", [([], "here names"), (["crack"], "'crack' is reg")])
def test_classes_that_cannot_be_counted(names, message):
    with pytest.raises(ConfigError, match=f"DATASETS.TRAIN: no data set {message}"):
        count_classes(names, "DATASETS.TRAIN")


def test_an_evaluation_of_keypoints_needs_no_training_data():
    cfg = zoo_cfg("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml")
    cfg.DATASETS.TRAIN = ("not_registered",)
    assert not build_mapper(cfg, False).use_keypoint and cfg.MODEL.KEYPOINT_ON


def test_the_categories_of_lvis_count_from_1():
    cfg = zoo_cfg("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.DATASETS.TEST = ("lvis_v1_val",)
    found = categories_of(cfg)
    assert [entry["id"] for entry in found] == list(range(1, 1204))
