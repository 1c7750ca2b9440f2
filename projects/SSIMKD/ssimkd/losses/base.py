"""What every distillation loss is: a module called with maps by level and the batch's context.

    student   Dict[str, Tensor]   level -> (N, C, H, W), float32, after the adapter
    teacher   Dict[str, Tensor]   the same levels and shapes, without gradient
context   Context             image sizes, strides, targets of the same batch
returns   Dict[str, Tensor]   part -> scalar, not weighted; their sum is the loss. A level's part
                              has the level's name
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from ssimkd.ssim.normalize import check_options, inside_of, normalize_maps
from ssimkd.utils.validate import check_coefficients

Maps = Dict[str, Tensor]


@dataclass
class Context:
    """The batch that the maps belong to.

    Attributes:
        image_sizes (list[(int, int)]): height and width of each image in pixels, unpadded.
        strides (dict[str, int]): level -> pixels per cell.
        targets (list[Instances] or None): ground truth of each image, boxes in pixels.
        mask_padding (bool): whether cells outside an image are left out.
        iteration (int): the training iteration, from 0.
    """

    image_sizes: List[Tuple[int, int]]
    strides: Dict[str, int]
    targets: Optional[List[Instances]] = None
    mask_padding: bool = True
    iteration: int = 0

    def cells(self, level: str, maps: Tensor) -> List[Tuple[int, int]]:
        """Height and width, in cells of a level, of what each image covers of the padded map."""
        height, width = maps.shape[-2:]
        if not self.mask_padding:
            return [(height, width)] * len(self.image_sizes)
        stride = self.strides[level]
        return [
            (min(height, math.ceil(h / stride)), min(width, math.ceil(w / stride)))
            for h, w in self.image_sizes
        ]

    def inside(self, level: str, maps: Tensor) -> Optional[Tensor]:
        """(N, 1, H, W), true for the cells of the images; None where that is every cell."""
        height, width = maps.shape[-2:]
        cells = self.cells(level, maps)
        if all(size == (height, width) for size in cells):
            return None
        return inside_of(torch.tensor(cells, device=maps.device), maps)

    def crops(self, level: str, *maps: Tensor) -> Iterator[Tuple[List[Tensor], float]]:
        """Cuts maps to their images.

        Yields:
            (list of (n, C, h, w), float): the maps of n images that cover equally many cells, and
            their share n / N of the batch.
        """
        groups = defaultdict(list)
        for image, size in enumerate(self.cells(level, maps[0])):
            groups[size].append(image)
        for (h, w), images in groups.items():
            whole = len(images) == len(self.image_sizes)  # spares a copy
            yield (
                [(m if whole else m[images])[..., :h, :w] for m in maps],
                len(images) / len(self.image_sizes),
            )


class KDLoss(nn.Module):
    """Base of the losses; keyword arguments are the keys of the loss's config node.

    Args:
        weight (float): lambda, >= 0; the caller applies it. 0 only watches the loss.
    """

    name: str

    def __init__(self, weight: float) -> None:
        super().__init__()
        check_coefficients(weight=weight)
        self.weight = float(weight)

    def attach(self, channels: Dict[str, int], num_classes: int) -> None:
        """Makes the trainable parts, if a loss has any, once the levels are known.

        They are trained with the student and kept under `distiller.` in its checkpoint. Each must
        take part in every step, whatever the batch holds: DistributedDataParallel waits for it.

        Args:
            channels (dict[str, int]): level -> channels of both maps, after the adapter.
            num_classes (int): object classes that the student's head predicts; 0: not known.
        """

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """See the head of this file."""
        raise NotImplementedError


class MapLoss(KDLoss):
    """A loss that compares normalised maps of one image and level at a time.

    Each image counts the same, however large it is, and gives the same value alone or in a batch
    (but for `normalize_scope="batch"`).
    """

    def __init__(self, weight: float, normalize: str, normalize_scope: str) -> None:
        super().__init__(weight)
        check_options(normalize, normalize_scope)
        self.normalize, self.normalize_scope = normalize, normalize_scope

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean loss of two stacks of maps, (n, C, h, w) each, over all of their elements."""
        raise NotImplementedError

    def compare_level(
        self, level: str, student: Tensor, teacher: Tensor, context: Context
    ) -> Tensor:
        """Mean loss over the images of a batch, whose maps are (N, C, H, W)."""
        s, t = normalize_maps(
            student,
            teacher,
            self.normalize,
            self.normalize_scope,
            context.inside(level, student),
        )
        crops = context.crops(level, s, t)
        return torch.stack([self.compare(*maps) * share for maps, share in crops]).sum()

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """See the head of this file."""
        return {
            level: self.compare_level(level, student[level], teacher[level], context)
            for level in student
        }
