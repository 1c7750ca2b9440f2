"""Which levels of student and teacher are compared, and which of their cells."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from ssimkd import ConfigError
from ssimkd.modeling.levels import match_cells, match_levels

KEY = "MODEL.DISTILL.IN_FEATURES"


def shapes(**strides):
    return {name: ShapeSpec(channels=8, stride=stride) for name, stride in strides.items()}


def test_levels_are_matched_by_stride_not_by_name():
    assert match_levels(shapes(p3=8, p4=16), shapes(p2=8, p3=16, p4=32)) == {"p3": "p2", "p4": "p3"}


def test_of_several_levels_of_one_stride_the_name_decides():
    assert match_levels(shapes(p5=32), shapes(res5=32, p5=32)) == {"p5": "p5"}
    with pytest.raises(ConfigError, match=f"{KEY}: p5 .* several levels"):
        match_levels(shapes(p5=32), shapes(a=32, b=32))


def test_a_level_that_the_teacher_lacks_is_named():
    with pytest.raises(ConfigError, match=f"{KEY}: p6 has stride 64.* no level"):
        match_levels(shapes(p6=64), shapes(p2=4, p3=8))


def test_cells_that_only_one_of_the_maps_has_are_cut_off():
    student, teacher = torch.rand(1, 1, 4, 7), torch.rand(1, 1, 5, 6).double()
    s, t = match_cells(("p4", student, (60, 100)), ("p4", teacher, (80, 96)), 16)  # 60 / 16 = 3.75
    assert torch.equal(s, student[..., :4, :6]) and torch.equal(t, teacher[..., :4, :6])


def test_maps_that_do_not_have_one_cell_per_stride_are_refused():
    student, teacher = torch.zeros(1, 1, 12, 12), torch.zeros(1, 1, 11, 12)
    with pytest.raises(
        ConfigError, match=rf"{KEY}: the teacher's p3 is \(11, 12\) cells.*stride 8"
    ):
        match_cells(("p3", student, (96, 96)), ("p3", teacher, (96, 96)), 8)
