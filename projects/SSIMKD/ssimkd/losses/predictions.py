"""The predictions of a detector's heads, in the form in which losses compare them.

M   cells of one level that belong to the images of a batch
A   anchors of a cell; FCOS has one
K   object classes; an RPN has one, which is "object"
R   proposals of a batch

A loss names in its attribute `compares` which heads it needs:

    "rpn", "dense"   Dict[str, AnchorPredictions]   by level, for RPNs and for RetinaNet or FCOS
    "roi"            List[ProposalPredictions]      one for each stage of the box head, in order
    "cross"          Dict[str, AnchorPredictions]   the teacher's head on the student's features
"""

from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Tuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

Predictions = Dict[str, Any]  # kind of head -> what it predicts


@dataclass
class AnchorPredictions:
    """The predictions of an RPN or a dense head at one level.

    Attributes:
        logits (Tensor): (M, A, K), class scores before the sigmoid.
        deltas (Tensor or None): (M, A, 4), box deltas in the student's units, of an RPN.
        boxes (Tensor or None): (M, A, 4), x0, y0, x1, y1 in pixels, of a dense head.
        centerness (Tensor or None): (M, A), before the sigmoid, of FCOS.
        positives (float): running mean of the number of anchors with an object in a batch, by which
            the student's dense head divides its own losses.
    """

    logits: Tensor
    deltas: Any = None
    boxes: Any = None
    centerness: Any = None
    positives: float = 1.0

    def scores(self) -> Tensor:
        """(M, A): the largest of the class probabilities, without gradient."""
        return self.logits.detach().amax(dim=2).sigmoid()


@dataclass
class ProposalPredictions:
    """The predictions of one stage of a box head for its proposals, those of all images in a row.

    Attributes:
        logits (Tensor): (R, K + 1), class scores before the softmax; the last one is background.
        deltas (Tensor): (R, K, 4), box deltas in the student's units; (R, 1, 4) if class-agnostic.
        proposals (list[Boxes]): of each image, R in all.
        matcher (Matcher): decides which proposals have an object. Only the student's is needed.
    """

    logits: Tensor
    deltas: Tensor
    proposals: List[Boxes]
    matcher: Any = None

    def deltas_of(self, classes: Tensor) -> Tensor:
        """(R, 4): the box deltas of a class (R,) for each proposal."""
        if self.deltas.shape[1] == 1:
            return self.deltas[:, 0]
        return self.deltas.gather(1, classes[:, None, None].expand(-1, 1, 4))[:, 0]

    def labels(self, targets: List[Instances]) -> Tensor:
        """(R,) classes in [0, K] that the student's own loss gives to the proposals."""
        labels = []
        for boxes, objects in zip(self.proposals, targets):
            background = self.logits.shape[1] - 1
            label = torch.full((len(boxes),), background, device=self.logits.device)
            if len(objects) and len(boxes):
                overlaps = pairwise_iou(objects.gt_boxes.to(label.device), boxes)
                nearest, matched = self.matcher(overlaps)
                classes = objects.gt_classes.to(label.device)[nearest]
                label = torch.where(matched == 1, classes, label)
            labels.append(label)
        return torch.cat(labels)


def binary_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the probabilities of two logits, of any shape; 0 where they are equal.

    It has the gradient of the binary cross-entropy with the teacher's probability as its target.
    """
    target = teacher.sigmoid()
    # softplus(s) - softplus(t) - target (s - t)
    return F.softplus(student) - F.softplus(teacher) - target * (student - teacher)


def softmax_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """(R,) KL divergence of the probabilities of two logits (R, K); 0 where they are equal."""
    log_q, log_p = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def by_stage(
    student: Predictions, teacher: Predictions
) -> Iterator[Tuple[str, ProposalPredictions, ProposalPredictions]]:
    """The ending of each stage's parts, "" if there is one stage, and the stage's predictions."""
    stages = list(zip(student.get("roi", ()), teacher.get("roi", ())))
    for stage, (s, t) in enumerate(stages):
        yield f"_stage{stage}" if len(stages) > 1 else "", s, t


def binary_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Binary cross-entropy of logits with the teacher's probability as target, of any shape."""
    return F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")


def giou_cost(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - GIoU of boxes (..., 4), in [0, 2] (Rezatofighi et al., CVPR 2019).

    Two equal boxes cost 0 even if they are empty.
    """
    (x0, y0, x1, y1), (a0, b0, a1, b1) = student.unbind(-1), teacher.unbind(-1)
    overlap = (x1.minimum(a1) - x0.maximum(a0)).clamp(min=0)
    overlap = overlap * (y1.minimum(b1) - y0.maximum(b0)).clamp(min=0)
    union = (x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - overlap
    hull = (x1.maximum(a1) - x0.minimum(a0)) * (y1.maximum(b1) - y0.minimum(b0))
    return (union - overlap) / union.clamp(min=1e-7) + (hull - union) / hull.clamp(min=1e-7)
