"""The base classes of the losses.

A loss is called with the maps of student and teacher, and returns its parts:

    student   Dict[str, Tensor]   level -> (N, C, H, W), after the adapter, in the detector's own
                                  precision: a loss computes in float32, see `as_float`
    teacher   Dict[str, Tensor]   the same levels and shapes, without gradient
    context   Context             what else is known about the batch
    returns   Dict[str, Tensor]   part -> scalar, without the loss's weight. The loss is the sum of
                                  its parts. The part of a level has the level's name.

A loss whose `compares` names kinds of heads is called with their predictions in place of the maps:

    student, teacher   Dict[str, Any]   kind of head -> its predictions, see `predictions.py`
"""

from typing import Dict, List, Tuple

from torch import Tensor, nn

from ssimkd.ssim.normalize import as_float, check_options, normalize_maps
from ssimkd.utils.validate import check_coefficients

from .context import Context

Maps = Dict[str, Tensor]


class KDLoss(nn.Module):
    """Base class of the losses. Its keyword arguments are the keys of its config node.

    Args:
        weight (float): lambda, >= 0, which the caller applies; 0: the loss is only logged.
    """

    name: str  # set by `register_loss`
    compares: Tuple[str, ...] = ("maps",)  # or the kinds of heads that the loss can compare
    needs_boxes: bool = False
    layer: int = 0  # for the kind "cross": see `crosskd.py`
    # the option that says for how many iterations the student gets no gradient
    starts_after: str = ""

    def __init__(self, weight: float) -> None:
        super().__init__()
        check_coefficients(weight=weight)
        self.weight = float(weight)

    @property
    def of_maps(self) -> bool:
        """Whether it compares maps, and not the predictions of heads."""
        return self.compares == ("maps",)

    @property
    def learns_without_labels(self) -> bool:
        """Whether it takes images without labels."""
        return self.of_maps and not self.needs_boxes

    @property
    def first_iteration(self) -> int:
        """The first iteration in which it has a gradient for the student."""
        return getattr(self, self.starts_after) if self.starts_after else 0

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


def in_float(*sides: Maps) -> List[Maps]:
    """Maps of student and teacher in float32; float64 stays."""
    return [{level: as_float(maps) for level, maps in side.items()} for side in sides]


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
        return context.mean(level, self.compare, s, t)

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """Level -> scalar."""
        return {
            level: self.compare_level(level, student[level], teacher[level], context)
            for level in student
        }
