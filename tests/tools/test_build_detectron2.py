"""The Detectron2 wheel: every replacement fits the source, the wheel holds what it should."""

import importlib.metadata
import importlib.util
import re

import build_detectron2 as build
import pytest

from_index = importlib.metadata.version("detectron2").endswith(build.LOCAL_VERSION)
ours = pytest.mark.skipif(not from_index, reason="another Detectron2 is installed, and kept")


def test_a_row_that_does_not_fit_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("one two two")
    row = build.Replacement("a.py", r"two\b", "three", 2)
    build.apply_replacements(tmp_path, [row])
    assert (tmp_path / "a.py").read_text() == "one three three"
    with pytest.raises(SystemExit, match="a.py: .* matches 0 times, expected 2"):
        build.apply_replacements(tmp_path, [row])


@ours
def test_each_row_is_in_the_installed_package():
    import detectron2

    root = detectron2.__path__[0]
    rows = [row for row in build.REPLACEMENTS if row.file.startswith("detectron2/")]
    assert len(rows) > 10
    for row in rows:
        text = open(root + row.file[len("detectron2") :]).read()
        assert not re.search(row.old, text), row


@ours
def test_the_wheel_holds_zoo_projects_and_the_stand_in():
    import detectron2._C
    from detectron2 import model_zoo

    for project in ("deeplab", "panoptic_deeplab", "point_rend"):
        assert importlib.util.find_spec(f"detectron2.projects.{project}")
    assert model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml")
    assert model_zoo.get_config_file("new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py")
    with pytest.raises(ImportError, match="nms_rotated is compiled code"):
        detectron2._C.nms_rotated()


@ours
def test_the_class_table_is_printed(caplog):
    """Its AttributeError was swallowed on today's NumPy, and the table missing."""
    from detectron2.data.build import print_instances_class_histogram

    caplog.set_level("INFO")
    print_instances_class_histogram([{"annotations": [{"category_id": 1}]}], ["disk", "ring"])
    assert "disk    | 0" in caplog.text and "ring    | 1" in caplog.text
