"""A data set in Pascal VOC's format becomes COCO json."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from pycocotools.coco import COCO

OBJECT = (
    "<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def write_image(folder, name, *objects):
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    text = "".join(OBJECT.format(*values) for values in objects)
    path = folder / "Annotations" / f"{name}.xml"
    path.write_text(f"<annotation><filename>{name}.jpg</filename>{size}{text}</annotation>")


@pytest.fixture
def folder(tmp_path):
    for part in ("Annotations", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True)
    write_image(tmp_path, "b", ("cell", 1, 2, 11, 22), ("plate", 60, 40, 70, 48))
    write_image(tmp_path, "a", ("cell", 5, 5, 5, 9))  # without area
    (tmp_path / "ImageSets/Main/train.txt").write_text("b\na\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("a  1\n  \n")
    return tmp_path


def convert(folder, *args):
    command = [sys.executable, str(ROOT / "tools/voc_to_coco.py"), str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_boxes_are_clipped_and_classes_keep_their_order(folder):
    done = convert(folder, "--classes", "plate", "cell", "--splits", "train", "val+train")
    assert done.returncode == 0, done.stderr
    assert "2 images, 2 boxes; 1 clipped, 1 left out" in done.stderr
    train = json.loads((folder / "train.json").read_text())
    assert train["categories"] == [{"id": 1, "name": "plate"}, {"id": 2, "name": "cell"}]
    assert train["images"] == [
        {"id": 1, "file_name": "b.jpg", "width": 64, "height": 48},
        {"id": 2, "file_name": "a.jpg", "width": 64, "height": 48},
    ]
    keys = ("id", "image_id", "category_id", "bbox", "area")
    assert [tuple(a[key] for key in keys) for a in train["annotations"]] == [
        (1, 1, 2, [1, 2, 10, 20], 200),
        (2, 1, 1, [60, 40, 4, 8], 32),
    ]
    both = COCO(folder / "val_train.json")
    # an image of both splits is listed once
    assert [image["file_name"] for image in both.dataset["images"]] == ["a.jpg", "b.jpg"]
    assert sorted(both.imgs) == [1, 2] and len(both.getAnnIds(imgIds=[2])) == 2


@pytest.mark.parametrize(
    "args, said",
    [
        (("--classes", "cell"), "error: train: b.xml has the class 'plate', which --classes lacks"),
        (("--classes", "cell", "--splits", "test"), "error: test: .*test.txt"),
    ],
)
def test_an_error_names_the_file(folder, args, said):
    done = convert(folder, *args)
    assert done.returncode == 1
    assert re.search(said, done.stderr) and "Traceback" not in done.stderr
