"""A student's levels and the teacher's that answer them, cell by cell."""

import math
from typing import Dict, Tuple

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor

from ssimkd.errors import ConfigError


def match_levels(student: Dict[str, ShapeSpec], teacher: Dict[str, ShapeSpec]) -> Dict[str, str]:
    """Student level -> teacher level of equal stride.

    Raises:
        ConfigError: the teacher has none, or several and none of the student's name.
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


def check_cells(whose: str, maps: Tensor, stride: int, padded_size: Tuple[int, int]) -> None:
    """Raises ConfigError unless a map has one cell per `stride` pixels of the padded image."""
    expected = tuple(math.ceil(pixels / stride) for pixels in padded_size)
    if tuple(maps.shape[-2:]) != expected:
        raise ConfigError(
            f"MODEL.DISTILL.IN_FEATURES: {whose} is {tuple(maps.shape[-2:])} cells for images of "
            f"{padded_size} pixels, but stride {stride} gives {expected}: teacher and student "
            "would not be compared cell by cell"
        )


def crop_to_common(student: Tensor, teacher: Tensor) -> Tuple[Tensor, Tensor]:
    """Cuts off the cells that only one of two maps has: its own padding, right and below."""
    h, w = (min(a, b) for a, b in zip(student.shape[-2:], teacher.shape[-2:]))
    return student[..., :h, :w], teacher[..., :h, :w]


def as_float(x: Tensor) -> Tensor:
    """x in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
