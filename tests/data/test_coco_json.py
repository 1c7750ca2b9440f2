"""A user's annotation file: what is wrong with it is said in one line."""

import json

import pytest
from ssimkd import ConfigError
from ssimkd.data.coco_json import read_coco

IMAGE = {"id": 1, "file_name": "a.jpg", "height": 96, "width": 96}
BOX = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}
GOOD = {"images": [IMAGE], "annotations": [BOX], "categories": [{"id": 3, "name": "crack"}]}


def read(folder, labeled=True, **change):
    (folder / "a.jpg").write_bytes(b"")
    (folder / "own.json").write_text(json.dumps({**GOOD, **change}))
    return read_coco(str(folder / "own.json"), str(folder), labeled=labeled)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"categories": []}, "has no categories"),
        ({"annotations": []}, "has no annotations"),
        ({"images": {}}, "has no list 'images'"),
        ({"categories": GOOD["categories"] * 2}, "has the id 3 twice in 'categories'"),
        ({"annotations": [{**BOX, "category_id": 9}]}, "annotation of the unknown category_id 9"),
        ({"annotations": [{**BOX, "image_id": 9}]}, "annotation of the unknown image_id 9"),
        ({"annotations": [{**BOX, "bbox": [1, 2, 3]}]}, "bbox that is not .x, y, width, height"),
        ({"annotations": [{"id": 1}]}, "an entry of 'annotations' without 'image_id'"),
        ({"images": [{**IMAGE, "file_name": "b.jpg"}]}, "names the image .*b.jpg, which does not"),
    ],
)
def test_broken_annotation_files_are_refused(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **change)


def test_keypoints_of_the_json_are_swapped_in_flips(tmp_path):
    names = ["nose", "left_eye", "right_eye", "left_only", "LeftEar", "RightEar", "l_hip", "r_hip"]
    found = read(tmp_path, categories=[{"id": 3, "name": "face", "keypoints": names}])
    assert found["keypoint_names"] == names
    pairs = [("left_eye", "right_eye"), ("LeftEar", "RightEar"), ("l_hip", "r_hip")]
    assert found["keypoint_flip_map"] == pairs


def test_keypoints_without_a_left_and_a_right_one_are_a_warning(tmp_path, caplog):
    read(tmp_path, categories=[{"id": 3, "name": "face", "keypoints": ["port", "starboard"]}])
    assert "a flip exchanges none of them" in caplog.text


def test_boxes_without_area_or_outside_their_image_are_a_warning(tmp_path, caplog):
    boxes = [[4, 4, 0, 20], [100, 4, 20, 20], [4, 4, 20, 20], [-5, 4, 5, 20], [-5, 4, 6, 20]]
    read(tmp_path, annotations=[{**BOX, "id": i, "bbox": box} for i, box in enumerate(boxes)])
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path}/own.json: 3 of 5 boxes have no area or lie outside")
    assert said.endswith("id 0 in a.jpg, id 1 in a.jpg, id 3 in a.jpg")
    assert not caplog.records[0].harmless  # more than half of the boxes


def test_few_boxes_without_area_are_a_note(tmp_path, caplog):
    bad = {**BOX, "id": 0, "bbox": [4, 4, 0, 20]}
    read(tmp_path, annotations=[bad, *({**BOX, "id": i} for i in range(1, 200))])
    assert caplog.records[0].harmless  # one box of 200


def test_without_labels_only_the_images_are_read(tmp_path):
    assert read(tmp_path, annotations=[{"id": "wrong"}], categories=[], labeled=False) == {}
    with pytest.raises(ConfigError, match="has an entry of 'images' without"):
        read(tmp_path, images=[{"id": 1}], labeled=False)
