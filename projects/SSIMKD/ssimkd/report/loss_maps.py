"""How alike a student's maps are to its teacher's over a sample of images."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor

from ssimkd.evaluation.similarity import Pair, cell_maps, fill, normalized_pairs
from ssimkd.ssim.definition import ssim_map


@dataclass
class LevelSimilarity:
    """One level over several images.

    Attributes:
        images (list[float]): SSIM of each image, the mean over channels and cells.
        channels (np.ndarray): (C,) SSIM of each channel, the mean over cells and images.
        student_flat, teacher_flat, both_flat (float): share of the cells of all channels whose
            local variance is below SSIM's C2; where both are, the constant decides.
    """

    images: List[float] = field(default_factory=list)
    channels: np.ndarray = field(default_factory=lambda: np.zeros(0))
    student_flat: float = 0.0
    teacher_flat: float = 0.0
    both_flat: float = 0.0


def flat_cells(x: Tensor, options: Dict[str, Any]) -> Tensor:
    """(1, C, H, W), 1 where the local variance of x is below C2, else 0; NaN where none is known.

    The contrast of x with a map of zeros is C2 / (var_x + C2).
    """
    contrast = ssim_map(x, torch.zeros_like(x), **{**options, "exponents": (0.0, 1.0, 0.0)})
    return fill((contrast > 0.5).to(x.dtype), x)


def measure_levels(model: Any, inputs: List[Dict[str, Any]]) -> Dict[str, LevelSimilarity]:
    """Compares a student with its teachers; empty for a detector without one.

    Args:
        model (nn.Module): the student.
        inputs (list[dict]): what it takes, one image each; all count the same.
    """
    levels: Dict[str, LevelSimilarity] = {}
    for x in inputs:
        for level, pair in normalized_pairs(model, x):
            channels, student_flat, teacher_flat, both_flat = measure(pair)
            found = levels.setdefault(level, LevelSimilarity(channels=np.zeros(len(channels))))
            found.images.append(float(channels.mean()))
            found.channels += channels / len(inputs)
            found.student_flat += student_flat / len(inputs)
            found.teacher_flat += teacher_flat / len(inputs)
            found.both_flat += both_flat / len(inputs)
    return levels


def measure(pair: Pair) -> Tuple[np.ndarray, float, float, float]:
    """SSIM by channel, and the shares of flat cells: of the student, the teacher, and both."""
    channels = cell_maps(pair)["SSIM"].nanmean(dim=(1, 2)).cpu().numpy()
    student, teacher = (flat_cells(x, pair.options) for x in (pair.student, pair.teacher))
    shares = [float(x.nanmean()) for x in (student, teacher, student * teacher)]
    return channels, shares[0], shares[1], shares[2]
