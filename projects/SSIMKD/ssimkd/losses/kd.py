"""Soft targets: a student's heads learn the predictions of its teacher's (Hinton et al., 2015)."""

from typing import Any, Dict, Tuple

import torch
from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_coefficients, check_factors, check_positive

from .base import KDLoss
from .context import Context
from .predictions import (
    AnchorPredictions,
    Predictions,
    ProposalPredictions,
    binary_kl,
    by_stage,
    giou_cost,
    softmax_kl,
)


@register_loss("kd")
class SoftTargetLoss(KDLoss):
    """Divergence of the class probabilities, and distance of the boxes where there is an object.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; for both stages of a
    detector Chen et al., NeurIPS 2017. With p = softmax(z / tau) or sigmoid(z / tau),
    student S, teacher T, and w the teacher's probability of an object:

        roi_cls      tau^2 / R sum_r KL(p_T || p_S), over all classes and the background
        roi_box      1 / R sum_r w |d_S - d_T|, of the class that the teacher finds most probable
        rpn_cls      tau^2 / W sum_a KL(p_T || p_S) of "object or not", W = max(1, sum_a w)
        rpn_box      1 / W sum_a w |d_S - d_T|
        dense_cls    tau^2 / P sum_a sum_k KL(p_T || p_S)
        dense_box    1 / P sum_a w (1 - GIoU(b_S, b_T))
        centerness   1 / P sum_a w KL(c_T || c_S), of FCOS

    for R proposals, anchors a, box deltas d in the units of the student's own loss, boxes b in
    pixels. `predictions.py` has their shapes. |.| is Detectron2's smooth L1 loss with its default
    beta of 0. P is the number of anchors with an object by which a dense detector divides its own
    losses (running mean). The divergences have the gradients of cross-entropies with the teacher's
    probabilities as targets, and are 0 where both agree. A box head of several stages has a value
    for each, such as roi_cls_stage1. No ground truth is needed, but images without labels take no
    part: the student's heads do not see them.

    All factors are 1, as in ALDI (github.com/justinkay/aldi), whose ROI parts have the same mean
    over R. The RPN's mean is another one. ALDI and Chen et al. take it over the anchors that are
    sampled with the ground truth, 256 in each of N images. Here all anchors take part, and W is the
    number of objects that the teacher expects. So rpn_cls is at least 256 N / W times theirs, and
    rpn_box, a sum of four coordinates, about four times ALDI's mean. ALDI's w is 0 or 1. Chen et
    al. weight the background in roi_cls by 1.5, with which equal predictions are not the optimum.

    Args:
        weight (float): lambda.
        temperature (float): tau.
        rpn_cls, rpn_box, roi_cls, roi_box, dense_cls, dense_box, centerness (float): factor of
            each part. A head both of whose factors are 0 is neither run nor compared.

    Raises:
        ConfigError: an option is out of its range.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,  # Chen et al., and others' detection settings
        rpn_cls: float = 1.0,
        rpn_box: float = 1.0,
        roi_cls: float = 1.0,
        roi_box: float = 1.0,
        dense_cls: float = 1.0,
        dense_box: float = 1.0,
        centerness: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_positive(temperature=temperature)
        self.temperature = temperature
        rpn, roi = dict(rpn_cls=rpn_cls, rpn_box=rpn_box), dict(roi_cls=roi_cls, roi_box=roi_box)
        dense = dict(dense_cls=dense_cls, dense_box=dense_box)
        check_factors(**rpn, **roi, **dense)
        check_coefficients(centerness=centerness)
        self.factors = {**rpn, **roi, **dense, "centerness": centerness}
        used = {"rpn": rpn, "roi": roi, "roi_box": {"": roi_box}, "dense": dense}
        self.compares = tuple(kind for kind, factors in used.items() if any(factors.values()))

    def forward(
        self, student: Predictions, teacher: Predictions, context: Context
    ) -> Dict[str, Tensor]:
        """Part -> scalar >= 0."""
        parts: Dict[str, Tensor] = {}
        for kind in (k for k in ("rpn", "dense") if k in self.compares and k in student):
            levels = [
                self.compare_anchors(kind, predictions, teacher[kind][level])
                for level, predictions in student[kind].items()
            ]
            divisor: Any = torch.stack([objects for objects, _ in levels]).sum().clamp(min=1)
            if kind == "dense":
                divisor = next(iter(student[kind].values())).positives
            for part in levels[0][1]:
                parts[part] = torch.stack([sums[part] for _, sums in levels]).sum() / divisor
        if "roi" in self.compares:
            for name, s, t in by_stage(student, teacher):
                parts.update({f"{k}{name}": x for k, x in self.compare_proposals(s, t).items()})
        return {k: self.factors[k.split("_stage")[0]] * x for k, x in parts.items()}

    def compare_anchors(
        self, kind: str, student: AnchorPredictions, teacher: AnchorPredictions
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Of one level, the sum of the teacher's probabilities and the sum of each part."""
        objects = teacher.scores()
        sums = {f"{kind}_cls": self.soften(binary_kl, student.logits, teacher.logits).sum()}
        if kind == "rpn":
            distance = (student.deltas - teacher.deltas).abs().sum(dim=2)
        else:
            distance = giou_cost(student.boxes, teacher.boxes)
        sums[f"{kind}_box"] = (objects * distance).sum()
        if student.centerness is not None:
            centerness = self.soften(binary_kl, student.centerness, teacher.centerness)
            sums["centerness"] = (objects * centerness).sum()
        return objects.sum(), sums

    def compare_proposals(
        self, student: ProposalPredictions, teacher: ProposalPredictions
    ) -> Dict[str, Tensor]:
        """The parts of one stage of a box head."""
        proposals = max(len(student.logits), 1)
        parts = {"roi_cls": self.soften(softmax_kl, student.logits, teacher.logits).sum()}
        if "roi_box" in self.compares:
            probabilities = teacher.logits.softmax(dim=1)
            classes = teacher.logits[:, :-1].argmax(dim=1)
            distance = student.deltas_of(classes) - teacher.deltas_of(classes)
            objects = 1 - probabilities[:, -1]
            parts["roi_box"] = (objects * distance.abs().sum(dim=1)).sum()
        return {part: value / proposals for part, value in parts.items()}

    def soften(self, divergence: Any, student: Tensor, teacher: Tensor) -> Tensor:
        """T^2 times a divergence of logits divided by T."""
        temperature = self.temperature
        return temperature**2 * divergence(student / temperature, teacher / temperature)
