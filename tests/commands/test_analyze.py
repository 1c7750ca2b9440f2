"""The table of parameters, FLOPs and speed."""

import re

import pytest
import torch
from conftest import shapes_cfg
from ssimkd.commands import analyze
from ssimkd.engine.arguments import load_config
from torch.utils.flop_counter import FlopCounterMode

YAML, LAZY = "configs/shapes/ssimkd.yaml", "tests/engine/lazy_shapes.py"


@pytest.fixture
def image(few_shapes):
    return f"{few_shapes}/ssimkd_shapes/val/000000.jpg"


def rows(capsys, config, *args):
    analyze.main(["--config-file", config, "--repeats", "1", *args])
    said = capsys.readouterr().out
    cells = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells[1:]}, said


def test_yaml_and_lazy_have_the_same_table(capsys, image):
    yaml, said = rows(capsys, YAML, "--image", image)
    lazy, _ = rows(capsys, LAZY, "--image", image)
    for name in ("student", "teacher"):
        assert yaml[name][1:3] == lazy[name][1:3] and float(yaml[name][4]) > 0
    assert yaml["student"][0] == "random" and yaml["teacher"][0] == "trained"
    assert yaml["teacher"][1] == "1.87 M" and yaml["student"][1] == "0.44 M"  # as `make train` says
    assert "torchvision::roi_align x 3" in said.split("Not counted")[1]
    assert "Image of 96 x 128 pixels" in said


def test_flops_are_those_of_another_counter():
    """torch's counter counts only convolutions and products, and counts additions as well."""
    _, spec = next(analyze.teachers_of(load_config(YAML, [], ())))
    model, _, _ = spec.load(torch.device("cpu"))
    image = torch.zeros(3, 96, 128, dtype=torch.uint8)
    total, backbone, _ = analyze.count_flops(model, image)
    with FlopCounterMode(model, display=False, depth=3) as counter, torch.no_grad():
        model([{"image": image}])
    counts = counter.get_flop_counts()
    for own, other in ((total, counter.get_total_flops()), (backbone, flops(counts, "backbone"))):
        assert other / 2 <= own <= 1.1 * other / 2  # fvcore counts the norms as well


def flops(counts, module):
    (name,) = [name for name in counts if re.fullmatch(rf"\w+\.{module}", name)]
    return sum(counts[name].values())


def test_several_teachers_and_one_that_cannot_be_fetched():
    cfg = shapes_cfg("ssimkd", "MODEL.DISTILL.TEACHER.CONFIG", "")
    entries = [
        {"CONFIG": "configs/shapes/teacher.yaml", "WEIGHTS": weights, "NAME": name}
        for name, weights in (("a", "no.pth"), ("b", "configs/shapes/teacher.pth"))
    ]
    cfg.merge_from_list(["MODEL.DISTILL.TEACHERS", entries])
    found = analyze.load_all(cfg, "")
    assert {name: detector.trained for name, detector in found.items()} == {
        "student": False,
        "teacher a": False,
        "teacher b": True,
    }


def test_without_an_image_the_size_is_that_of_the_test_config():
    cfg = load_config("configs/ssimkd_R50.yaml", [], ())
    assert analyze.read_image(cfg, "").shape == (3, 800, 1067)  # 480 x 640, short side 800
