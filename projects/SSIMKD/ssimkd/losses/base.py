"""The base classes of the losses, and the context that each loss gets.

A loss is called with the maps of student and teacher, and returns its parts:

    student   Dict[str, Tensor]   level -> (N, C, H, W), float32 or float64, after the adapter
    teacher   Dict[str, Tensor]   the same levels and shapes, without gradient
    context   Context             what else is known about the batch
    returns   Dict[str, Tensor]   part -> scalar, without the loss's weight. The loss is the sum of
                                  its parts. The part of a level has the level's name.

A loss whose `compares` names kinds of heads is called with what they answer in place of the maps:

    student, teacher   Dict[str, Any]   kind of head -> its answers, see `responses.py`
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from ssimkd.errors import ConfigError
from ssimkd.ssim.normalize import check_options, inside_of, normalize_maps
from ssimkd.utils.validate import check_coefficients

Maps = Dict[str, Tensor]


@dataclass
class Context:
    """The batch that the maps belong to.

    Attributes:
        image_sizes (list[(int, int)]): height and width of each image in pixels, without padding.
        strides (dict[str, int]): level -> pixels per cell.
        targets (list[Instances] or None): ground truth of each image, with boxes in pixels.
        mask_padding (bool): whether cells outside an image are left out.
        iteration (int): number of the training iteration, from 0.
    """

    image_sizes: List[Tuple[int, int]]
    strides: Dict[str, int]
    targets: Optional[List[Instances]] = None
    mask_padding: bool = True
    iteration: int = 0

    def require_targets(self, loss: str) -> List[Instances]:
        """The ground truth, for a loss that cannot be computed without it.

        Raises:
            ConfigError: the batch has none.
        """
        if self.targets is None:
            raise ConfigError(
                f"MODEL.DISTILL.LOSSES: {loss} needs the ground truth, and the batch has no "
                f"instances: remove {loss}, or train on annotated images"
            )
        return self.targets

    def cells(self, level: str, maps: Tensor) -> List[Tuple[int, int]]:
        """Height and width of each image in cells of a level; a part of a cell counts as one.

        Args:
            level (str): a key of `strides`.
            maps (Tensor): (N, C, H, W), maps of that level.

        Returns:
            list[(int, int)]: at most (H, W) each; (H, W) for every image without `mask_padding`.
        """
        height, width = maps.shape[-2:]
        if not self.mask_padding:
            return [(height, width)] * len(self.image_sizes)
        stride = self.strides[level]
        return [
            (min(height, math.ceil(h / stride)), min(width, math.ceil(w / stride)))
            for h, w in self.image_sizes
        ]

    def inside(self, level: str, maps: Tensor) -> Optional[Tensor]:
        """Which cells of the maps belong to the images.

        Args:
            level, maps: see :meth:`cells`.

        Returns:
            Tensor or None: boolean, (N, 1, H, W); None where all cells do.
        """
        cells = self.cells(level, maps)
        if all(size == maps.shape[-2:] for size in cells):
            return None
        return inside_of(torch.tensor(cells).to(maps.device, non_blocking=True), maps)

    def crops(self, level: str, *maps: Tensor) -> Iterator[Tuple[List[Tensor], float]]:
        """Cuts maps to their images; images of the same size in cells stay together.

        Args:
            level (str): a key of `strides`.
            maps (Tensor): (N, ..., H, W), several maps of that level.

        Yields:
            (list of (n, ..., h, w), float): the maps of n images, and their share n / N.
        """
        groups = defaultdict(list)
        for image, size in enumerate(self.cells(level, maps[0])):
            groups[size].append(image)
        if len(groups) == 1:
            ((h, w),) = groups
            yield [m[..., :h, :w] for m in maps], 1.0
            return
        images = [m.unbind() for m in maps]
        for (h, w), members in groups.items():
            cut = [torch.stack([x[i][..., :h, :w] for i in members]) for x in images]
            yield cut, len(members) / len(self.image_sizes)


class KDLoss(nn.Module):
    """Base class of the losses. Its keyword arguments are the keys of its config node.

    Args:
        weight (float): lambda, >= 0, which the caller applies; 0: the loss is only logged.
    """

    name: str  # set by `register_loss`
    compares: Tuple[str, ...] = ("maps",)  # or the kinds of heads that the loss can compare
    layer: int = 0  # for the kind "cross": see `crosskd.py`

    def __init__(self, weight: float) -> None:
        super().__init__()
        check_coefficients(weight=weight)
        self.weight = float(weight)

    def attach(self, channels: Dict[str, int], num_classes: int) -> None:
        """Makes the trainable parts, for a loss that has some. It is called once.

        They are trained together with the student, and its checkpoint keeps them under
        `distiller.`. DistributedDataParallel requires that each of them takes part in every step,
        whatever the batch contains.

        Args:
            channels (dict[str, int]): level -> channels of both maps, after the adapter.
            num_classes (int): object classes that the student's head predicts; 0: not known.
        """

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """The parts of the loss; see the head of `base.py`."""
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
        """Level -> scalar."""
        return {
            level: self.compare_level(level, student[level], teacher[level], context)
            for level in student
        }
