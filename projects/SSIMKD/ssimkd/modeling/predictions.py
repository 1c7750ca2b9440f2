"""The predictions of a student's heads, and those of its teacher's heads at the same places.

An RPN and a dense head predict at every cell: the teacher's at the cells of its own maps. A box
head predicts for proposals: the teacher's gets those that the student sampled, and pools its own
maps. `losses/predictions.py` says in which form the predictions reach a loss.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ssimkd.losses import Context
from ssimkd.losses.predictions import AnchorPredictions, Predictions, ProposalPredictions
from ssimkd.ssim.normalize import as_float
from ssimkd.teacher.heads import (
    box_predictors,
    continue_head,
    levels_of,
    predict_anchors,
    predict_proposals,
    split_subnet,
)

from .gradient_ratio import GradientRatio

SUBNETS = ("cls_subnet", "bbox_subnet")  # of a dense head
Cells = List[Tuple[int, int]]  # height and width of each image in cells


@dataclass
class HeadOutputs:
    """What a student's heads took and gave in one forward.

    Attributes:
        detector (nn.Module): the student.
        anchors (dict[str, sequence[list[Tensor]]]): "rpn", "dense" -> logits, deltas and, of FCOS,
            centerness, each by level.
        proposals (list[list[Boxes]]): stage of the box head -> image -> boxes that were pooled.
        predictions (list[(Tensor, Tensor)]): stage of the box head -> logits and deltas.
        features (dict[(str, int), list[Tensor]]): subnet of a dense head and number of one of its
            convolutions -> what its block gave, by level.
    """

    detector: Any
    anchors: Dict[str, Sequence[List[Tensor]]] = field(default_factory=dict)
    proposals: List[List[Boxes]] = field(default_factory=list)
    predictions: List[Tuple[Tensor, Tensor]] = field(default_factory=list)
    features: Dict[Tuple[str, int], List[Tensor]] = field(default_factory=dict)

    def hook_targets(
        self, kinds: Iterable[str], layers: Iterable[int]
    ) -> Iterator[Tuple[str, nn.Module, Callable]]:
        """For each module to hook: its kind of head, the module, and what stores its output."""
        detector = self.detector
        if "rpn" in kinds:
            head = detector.proposal_generator.rpn_head
            yield "rpn", head, lambda output: self.anchors.update(rpn=output)
        if "dense" in kinds:
            yield "dense", detector.head, lambda output: self.anchors.update(dense=output)
        for predictor in box_predictors(detector) if "roi" in kinds else ():
            yield "roi", predictor, self.predictions.append
        for name, layer in product(SUBNETS, layers) if "cross" in kinds else ():
            levels = self.features[name, layer] = []
            block = split_subnet(getattr(detector.head, name), layer)[0][-1]
            yield "cross", block, levels.append


def copied(output: Any) -> Any:
    """Copies of a tensor, or of those in nested lists and tuples."""
    return output.clone() if isinstance(output, Tensor) else type(output)(map(copied, output))


@contextmanager
def capture_heads(
    detector: Any,
    kinds: Iterable[str],
    layers: Iterable[int] = (),
    ratio: Optional[GradientRatio] = None,
) -> Iterator[HeadOutputs]:
    """Keeps what heads of these kinds take and give while the block runs.

    Args:
        detector (nn.Module): the student. The hooks are removed after the block.
        kinds (iterable[str]): see `teacher/heads.py`; () registers no hook.
        layers (iterable[int]): of the kind "cross": convolutions whose features are kept, from 1.
        ratio (GradientRatio or None): measures the two gradients at what the heads give.
    """
    outputs = HeadOutputs(detector)
    # An inference of RetinaNet or FCOS writes into what the head gave. With VIS_PERIOD such an
    # inference draws pictures during some training steps.
    period = getattr(detector, "vis_period", 0)
    draws = period > 0 and get_event_storage().iter % period == 0 if detector.training else True
    with ExitStack() as handles:
        for kind, module, take in outputs.hook_targets(kinds, layers):

            def hook(module, inputs, output, kind=kind, take=take):
                kept = output
                if ratio is not None:
                    output, kept = ratio.split(kind, output)
                take(copied(kept) if draws else kept)
                return output

            handles.callback(module.register_forward_hook(hook).remove)
        if "roi" in kinds:
            heads = detector.roi_heads
            pooler = heads.pooler if hasattr(heads, "res5") else heads.box_pooler
            handle = pooler.register_forward_pre_hook(
                lambda module, inputs: outputs.proposals.append(inputs[1])
            )
            handles.callback(handle.remove)
        yield outputs


def pair_predictions(
    outputs: HeadOutputs,
    teacher: Any,
    teacher_maps: Dict[str, Tensor],
    kinds: Iterable[str],
    context: Context,
    layer: int = 0,
) -> Tuple[Predictions, Predictions]:
    """The predictions of student and teacher.

    Args:
        outputs (HeadOutputs): of the student.
        teacher (nn.Module): the teacher's detector, with these kinds of heads.
        teacher_maps (dict[str, Tensor]): level -> (N, C, H, W), of its backbone.
        kinds (iterable[str]): see `teacher/heads.py`.
        context (Context): of the batch, with the strides of all levels.
        layer (int): of the kind "cross", the convolution after which the student's features go
            into the teacher's head, from 1.

    Returns:
        (dict, dict): kind -> what `losses/predictions.py` has for it, in float32 or float64.
    """
    student = outputs.detector
    of_student: Predictions = {}
    of_teacher: Predictions = {}
    if "roi" in kinds:
        of_student["roi"], of_teacher["roi"] = pair_proposals(outputs, teacher, teacher_maps)
    for kind in ("rpn", "dense"):
        if kind not in kinds:
            continue
        student_outputs = [list(map(as_float, levels)) for levels in outputs.anchors[kind]]
        with torch.no_grad():
            teacher_outputs, anchors = predict_anchors(teacher, kind, teacher_maps)
        logits = student_outputs[0], teacher_outputs[0]
        places = common_places(levels_of(student, kind), *logits, anchors, context)
        of_student[kind] = read_anchors(student, kind, student_outputs, places)
        of_teacher[kind] = read_anchors(teacher, kind, teacher_outputs, places)
        if kind == "rpn":  # the box deltas in the student's units
            for found in of_teacher[kind].values():
                found.deltas *= unit_ratio(student, teacher, kind, found.deltas)
            continue
        if "cross" in kinds:
            features = [list(map(as_float, outputs.features[name, layer])) for name in SUBNETS]
            crossed = continue_head(teacher, features, layer)
            of_student["cross"] = read_anchors(teacher, kind, crossed, places)
        # on Detectron2's main branch it exists only after a first training step
        positives = max(1.0, float(getattr(student, "loss_normalizer", 1.0)))
        for found in chain(*(of_student.get(k, {}).values() for k in ("dense", "cross"))):
            found.positives = positives
    return of_student, of_teacher


def pair_proposals(
    outputs: HeadOutputs, teacher: Any, teacher_maps: Dict[str, Tensor]
) -> Tuple[List[ProposalPredictions], List[ProposalPredictions]]:
    """Both box heads' predictions for the student's proposals, for the stages that both have."""
    heads = outputs.detector.roi_heads
    matchers = getattr(heads, "proposal_matchers", None) or [heads.proposal_matcher]
    with torch.no_grad():
        teacher_outputs = predict_proposals(teacher, teacher_maps, outputs.proposals)
    of_student, of_teacher = [], []
    for stage, pair in enumerate(zip(outputs.predictions, teacher_outputs)):
        boxes = outputs.proposals[stage]
        (logits, deltas), (teacher_logits, teacher_deltas) = (map(as_float, x) for x in pair)
        of_student.append(
            ProposalPredictions(logits, deltas.unflatten(1, (-1, 4)), boxes, matchers[stage])
        )
        ratio = unit_ratio(outputs.detector, teacher, "roi", teacher_deltas, stage)
        teacher_deltas = teacher_deltas.unflatten(1, (-1, 4)) * ratio
        of_teacher.append(ProposalPredictions(teacher_logits, teacher_deltas, boxes))
    return of_student, of_teacher


def common_places(
    levels: Sequence[str],
    student: List[Tensor],
    teacher: List[Tensor],
    anchors: List[Boxes],
    context: Context,
) -> Dict[str, Tuple[Cells, Tensor]]:
    """The cells that both detectors have and that belong to the images.

    Args:
        levels (sequence[str]): of the student's head.
        student, teacher (list[Tensor]): (N, A K, H, W) by level, logits.
        anchors (list[Boxes]): H W A by level, of the teacher's maps.
        context (Context): of the batch.

    Returns:
        dict[str, (Cells, Tensor)]: level -> each image's size, and their (M, A, 4) anchors.
    """
    places = {}
    for level, s, t, boxes in zip(levels, student, teacher, anchors):
        height, width = t.shape[-2:]
        rows, columns = (min(a, b) for a, b in zip(s.shape[-2:], t.shape[-2:]))
        cells = context.cells(level, s[..., :rows, :columns])
        grid = boxes.tensor.view(height, width, -1, 4)
        places[level] = cells, torch.cat([grid[:h, :w].flatten(0, 1) for h, w in cells])
    return places


def read_anchors(
    detector: Any,
    kind: str,
    outputs: Sequence[List[Tensor]],
    places: Dict[str, Tuple[Cells, Tensor]],
) -> Dict[str, AnchorPredictions]:
    """What an RPN or a dense head predicts at these places, by level of the student.

    Args:
        detector (nn.Module): has the head.
        kind (str): "rpn" or "dense".
        outputs (sequence[list[Tensor]]): what it gave, see :class:`HeadOutputs`.
        places (dict): see :func:`common_places`.
    """
    found = {}
    for index, (level, (cells, anchors)) in enumerate(places.items()):
        logits, deltas, *rest = (at_cells(x[index], cells, anchors.shape[1]) for x in outputs)
        if kind == "rpn":
            found[level] = AnchorPredictions(logits, deltas=deltas)
            continue
        transform = detector.box2box_transform
        boxes = transform.apply_deltas(deltas.flatten(0, 1), anchors.flatten(0, 1))
        centerness = rest[0].squeeze(2) if rest else None
        found[level] = AnchorPredictions(
            logits, boxes=boxes.view_as(anchors), centerness=centerness
        )
    return found


def at_cells(outputs: Tensor, cells: Cells, anchors: int) -> Tensor:
    """What a convolution gave at the cells of the images: (N, A K, H, W) -> (M, A, K)."""
    images = [x[:, :h, :w].flatten(1) for x, (h, w) in zip(outputs, cells)]  # (A K, h w)
    return torch.cat(images, dim=1).unflatten(0, (anchors, -1)).permute(2, 0, 1)


def unit_ratio(student: Any, teacher: Any, kind: str, like: Tensor, stage: int = 0) -> Any:
    """The factors, (4,) or 1, from the units of a teacher's box deltas to its student's."""
    student_weights, teacher_weights = (
        detector.proposal_generator.box2box_transform.weights
        if kind == "rpn"
        else box_predictors(detector)[stage].box2box_transform.weights
        for detector in (student, teacher)
    )
    if student_weights == teacher_weights:
        return 1.0
    return like.new_tensor(student_weights) / like.new_tensor(teacher_weights)
