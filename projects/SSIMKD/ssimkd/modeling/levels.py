"""The levels of a student and those of its teacher that they are compared with, cell by cell.

A level is a map that a backbone returns under a name, such as "p3". Its stride is the number of
pixels per cell.
"""

import math
from typing import Dict, Sequence, Tuple

from detectron2.layers import ShapeSpec
from torch import Tensor

from ssimkd.errors import ConfigError
from ssimkd.utils.validate import check_coefficients

Shapes = Dict[str, ShapeSpec]
Size = Tuple[int, int]


def check_levels(levels: Sequence[str], weights: Sequence[float]) -> Dict[str, float]:
    """Level -> its weight; {} if there are no weights.

    Raises:
        ConfigError: the weights are not as many as the levels, finite and >= 0.
    """
    if weights and len(weights) != len(levels):
        raise ConfigError(
            f"MODEL.DISTILL.LEVEL_WEIGHTS has {len(weights)} numbers for the {len(levels)} levels "
            f"of IN_FEATURES, {', '.join(levels)}"
        )
    for weight in weights:
        check_coefficients(**{"MODEL.DISTILL.LEVEL_WEIGHTS": weight})
    return dict(zip(levels, map(float, weights)))


def select_levels(student: Shapes, levels: Sequence[str]) -> Shapes:
    """The shapes of these levels; raises ConfigError for a level that the student lacks."""
    for level in levels:
        if level not in student:
            has = ", ".join(student)
            raise ConfigError(
                f"MODEL.DISTILL.IN_FEATURES: the student has no {level}; it has {has}"
            )
    return {level: student[level] for level in levels}


def match_levels(student: Shapes, teacher: Shapes) -> Dict[str, str]:
    """Level of the student -> level of the teacher with the same stride.

    Raises:
        ConfigError: the teacher has none, or it has several and none has the student's name.
    """
    matched = {}
    for level, shape in student.items():
        names = [name for name, other in teacher.items() if other.stride == shape.stride]
        if level in names:
            names = [level]
        if len(names) != 1:
            has = ", ".join(f"{name} (stride {other.stride})" for name, other in teacher.items())
            raise ConfigError(
                f"MODEL.DISTILL.IN_FEATURES: {level} has stride {shape.stride}, and the teacher "
                f"has {'several levels' if names else 'no level'} of it; it has {has}"
            )
        matched[level] = names[0]
    return matched


def check_channels(student: Shapes, teacher: Shapes, matched: Dict[str, str]) -> None:
    """Raises ConfigError unless matched levels have equally many channels."""
    for level, name in matched.items():
        found, expected = student[level].channels, teacher[name].channels
        if found != expected:
            raise ConfigError(
                f"MODEL.DISTILL.ADAPTER: {level} has {found} channels in the student and "
                f"{expected} in the teacher; set it to conv1x1"
            )


def match_cells(
    student: Tuple[str, Tensor, Size], teacher: Tuple[str, Tensor, Size], stride: int
) -> Tuple[Tensor, Tensor]:
    """Cuts two maps of one stride to the cells that both have.

    Student and teacher may pad a batch to different sizes, to the right and below.

    Args:
        student, teacher (str, Tensor, (int, int)): name of the level, map (N, C, H, W), and height
            and width of the padded images in pixels.
        stride (int): pixels per cell.

    Returns:
        (Tensor, Tensor): (N, C, h, w).

    Raises:
        ConfigError: a map does not have one cell per `stride` pixels.
    """
    for whose, (name, maps, size) in (("student", student), ("teacher", teacher)):
        expected = tuple(math.ceil(pixels / stride) for pixels in size)
        if tuple(maps.shape[-2:]) != expected:
            raise ConfigError(
                f"MODEL.DISTILL.IN_FEATURES: the {whose}'s {name} is {tuple(maps.shape[-2:])} "
                f"cells for images of {size} pixels, but stride {stride} gives {expected}: teacher "
                "and student would not be compared cell by cell"
            )
    s, t = student[1], teacher[1]
    height, width = (min(a, b) for a, b in zip(s.shape[-2:], t.shape[-2:]))
    return s[..., :height, :width], t[..., :height, :width]
