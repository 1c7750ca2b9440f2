"""The batch that maps belong to, and which cells of the maps only pad an image to the batch's size.

A loss leaves these cells out by :meth:`Context.inside`, :meth:`Context.crops` or
:meth:`Context.mean`.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.structures import Instances
from torch import Tensor

from ssimkd.errors import ConfigError
from ssimkd.ssim.normalize import inside_of


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
        """The ground truth, for a loss that cannot be computed without its boxes.

        Raises:
            ConfigError: the batch has none, or its boxes are rotated.
        """
        if self.targets is None:
            raise ConfigError(
                f"MODEL.DISTILL.LOSSES: {loss} needs the ground truth, and the batch has no "
                f"instances: remove {loss}, or train on annotated images"
            )
        for boxes in (x.get("gt_boxes") if x.has("gt_boxes") else None for x in self.targets):
            if boxes is None or boxes.tensor.shape[-1] != 4:
                found = "none" if boxes is None else type(boxes).__name__
                raise ConfigError(
                    f"MODEL.DISTILL.LOSSES: {loss} needs upright boxes (Boxes), and the instances "
                    f"of the batch have {found}: remove {loss}"
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
        if not self.mask_padding:
            return [(maps.shape[-2], maps.shape[-1])] * len(self.image_sizes)
        return self.image_cells(level, maps)

    def image_cells(self, level: str, maps: Tensor) -> List[Tuple[int, int]]:
        """Height and width of each image in cells, without its padding; see :meth:`cells`."""
        (height, width), stride = maps.shape[-2:], self.strides[level]
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
        return inside_of(cells, maps)

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

    def mean(self, level: str, compare: Callable[..., Tensor], *maps: Tensor) -> Tensor:
        """Mean over the images of a loss that compares their maps.

        Args:
            level, maps: see :meth:`crops`.
            compare (callable): takes the maps of n images, (n, ..., h, w) each; returns the mean of
                their losses.
        """
        crops = self.crops(level, *maps)
        return torch.stack([compare(*cut) * share for cut, share in crops]).sum()
