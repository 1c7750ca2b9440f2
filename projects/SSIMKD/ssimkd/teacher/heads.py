"""The heads of detectors: which ones a detector has, whether two fit, and what they predict.

A kind of head is "rpn", "roi" (the box head of an R-CNN), "roi_box" (its box deltas), "dense" (the
head of RetinaNet and FCOS) or "cross" (the convolutions in front of a dense head's predictions).
"""

from typing import Any, Dict, Iterable, List, Sequence, Tuple

from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes
from torch import Tensor, nn

from ssimkd.errors import ConfigError

Facts = Dict[str, Any]
# Kind -> its name in error messages
NAMES = {
    "rpn": "an RPN",
    "roi": "a box head with a softmax (FastRCNNOutputLayers)",
    "roi_box": "a box head with a softmax (FastRCNNOutputLayers)",
    "dense": "a head of RetinaNet or FCOS",
    "cross": "a head of RetinaNet or FCOS",
}
CLASSES = "the number of classes"
CHANNELS = "the channels of the head's convolutions"
# Kind -> the detector's modules that it consists of; a detector has not all of them
MODULES = {
    "rpn": ("proposal_generator",),
    "roi": tuple(
        f"roi_heads.{name}"
        for name in ("pooler", "res5", "box_pooler", "box_head", "box_predictor")
    ),
    "dense": ("head", "anchor_generator"),
}


def describe_heads(detector: Any) -> Dict[str, Facts]:
    """The kinds of heads that a detector has, and what must be equal in student and teacher.

    Of a head that cannot be compared at all, such as one of rotated boxes, the facts are empty.
    """
    heads: Dict[str, Facts] = {}
    rpn = getattr(detector, "proposal_generator", None)
    if isinstance(rpn, RPN):
        rotated = rpn.anchor_generator.box_dim != 4
        heads["rpn"] = {} if rotated else describe_anchors(rpn.anchor_generator)
    if getattr(detector, "roi_heads", None) is not None:
        heads["roi"], heads["roi_box"] = {}, {}
        for predictor in box_predictors(detector)[:1]:
            agnostic = predictor.bbox_pred.out_features == 4
            heads["roi"] = {CLASSES: predictor.cls_score.out_features - 1}
            heads["roi_box"] = {"whether boxes are class-agnostic": agnostic}
    head = getattr(detector, "head", None)
    if isinstance(head, RetinaNetHead):
        convolutions = [x for x in head.cls_subnet if isinstance(x, nn.Conv2d)]
        norms = {type(x).__name__ for x in head.cls_subnet if not isinstance(x, nn.Conv2d)}
        heads["dense"] = {
            "the kind of head": "FCOS" if hasattr(head, "ctrness") else "RetinaNet",
            CLASSES: detector.num_classes,
            **describe_anchors(detector.anchor_generator),
        }
        heads["cross"] = {
            CHANNELS: [x.out_channels for x in convolutions],
            "the norms and activations of the head": sorted(norms),
        }
    return heads


def describe_anchors(generator: Any) -> Facts:
    """What decides where the anchors are."""
    facts = {
        "the strides of the levels": list(generator.strides),
        "the offset of the anchors": generator.offset,
    }
    for stride, boxes in zip(generator.strides, generator.cell_anchors):
        facts[f"the anchors at stride {stride}"] = [
            [round(x, 2) for x in box] for box in boxes.tolist()
        ]
    return facts


def box_predictors(detector: Any) -> List[FastRCNNOutputLayers]:
    """The last layers of each stage of a detector's box head; [] if they are of another kind."""
    found = getattr(getattr(detector, "roi_heads", None), "box_predictor", None)
    stages = list(found) if isinstance(found, nn.ModuleList) else [found]
    for stage in stages:
        if not isinstance(stage, FastRCNNOutputLayers) or getattr(stage, "use_sigmoid_ce", False):
            return []
        if len(stage.box2box_transform.weights) != 4:  # rotated boxes
            return []
    return stages


def check_heads(
    loss: str,
    kinds: Sequence[str],
    student: Dict[str, Facts],
    teacher: Dict[str, Facts],
    names: Sequence[Sequence[str]] = ((), ()),
) -> None:
    """Raises ConfigError unless a teacher has these kinds of heads, and they fit the student's.

    Their classes must also have the same names, where these are known.

    Args:
        loss (str), kinds (sequence[str]): what the loss compares.
        student, teacher (dict[str, dict]): their heads.
        names (sequence[sequence[str]]): see :func:`check_class_names`.
    """
    for kind in kinds:
        check_has(loss, kind, "student", student)
        check_has(loss, kind, "teacher", teacher)
        for fact in {**student[kind], **teacher[kind]}:
            own, other = student[kind].get(fact), teacher[kind].get(fact)
            if own != other:
                more = f"; set MODEL.DISTILL.{loss.upper()}.ROI_BOX to 0" * (kind == "roi_box")
                if (loss, kind, fact) == ("kd", "roi", CLASSES):
                    more = (
                        "; set MODEL.DISTILL.KD.ROI_CLS and .ROI_BOX to 0 to compare the RPNs alone"
                    )
                for whose, known in zip(("student", "teacher"), names):
                    if fact == CLASSES and known:
                        listed = ", ".join([*known[:5], *["..."] * (len(known) > 5)])
                        more += f"; the {whose}'s training data has {listed}"
                raise ConfigError(
                    f"MODEL.DISTILL.LOSSES: {loss} cannot compare {NAMES[kind]} of student and "
                    f"teacher: {fact} is {own} in the student and {other} in the teacher{more}"
                )
    check_class_names(loss, kinds, student, names)


def head_modules(detector: nn.Module, kind: str, stages: int) -> List[str]:
    """The names of the modules that a kind of head consists of.

    Args:
        detector (nn.Module): the teacher.
        kind (str): a kind of head.
        stages (int): of a box head of several stages, as many are named.
    """
    found = []
    modules = dict(detector.named_modules())
    for name in (name for name in MODULES.get(kind, ()) if name in modules):
        parts = isinstance(modules[name], nn.ModuleList) and kind == "roi"
        found += [f"{name}.{k}" for k in range(stages)] if parts else [name]
    return found


def check_has(loss: str, kind: str, whose: str, heads: Dict[str, Facts]) -> None:
    """Raises ConfigError if student or teacher has no head of a kind that can be compared."""
    if not heads.get(kind):
        raise ConfigError(
            f"MODEL.DISTILL.LOSSES: {loss} compares the predictions of {NAMES[kind]}, and the "
            f"{whose} has none"
        )


def check_class_names(
    loss: str, kinds: Iterable[str], student: Dict[str, Facts], names: Sequence[Sequence[str]]
) -> None:
    """Raises ConfigError if student and teacher have other classes, or another order of them.

    Args:
        loss (str), kinds (iterable[str]): what the loss compares.
        student (dict[str, dict]): its heads.
        names (sequence[sequence[str]]): of the classes of the student's and the teacher's training
            data. A list that has not as many as the head has classes is of other data, and not
            looked at.
    """
    counts = {student[kind].get(CLASSES) for kind in kinds}
    own, other = names
    if len(own) in counts and len(other) in counts and list(own) != list(other):
        raise ConfigError(
            f"MODEL.DISTILL.LOSSES: {loss} compares class by class, and the training data has the "
            f"classes {', '.join(own)} for the student and {', '.join(other)} for the teacher. If "
            "they are the same, name the student's data in MODEL.DISTILL.TEACHER.OPTS"
        )


def keep_modules(detector: nn.Module, kept: Sequence[str], prefix: str = "") -> None:
    """Deletes what never runs, because its memory is needed.

    Args:
        detector (nn.Module): loses all modules but these, and those around and inside them.
        kept (sequence[str]): names of modules, as in `named_modules` of the whole detector.
        prefix (str): of the names inside `detector`.
    """
    for name, child in list(detector.named_children()):
        if not any(f"{other}.".startswith(f"{prefix}{name}.") for other in kept):
            delattr(detector, name)
        elif prefix + name not in kept:
            keep_modules(child, kept, f"{prefix}{name}.")


def levels_of(detector: Any, kind: str) -> Sequence[str]:
    """The levels of its backbone that a detector's "rpn" or "dense" head takes."""
    return detector.proposal_generator.in_features if kind == "rpn" else detector.head_in_features


def predict_anchors(detector: Any, kind: str, maps: Dict[str, Tensor]) -> Tuple[Any, List[Boxes]]:
    """What an RPN or a dense head predicts.

    Args:
        detector (nn.Module): with that kind of head.
        kind (str): "rpn" or "dense".
        maps (dict[str, Tensor]): level -> (N, C, H, W), of its backbone.

    Returns:
        tuple[list[Tensor]]: logits (N, A K, H, W) by level, deltas (N, A 4, H, W), and FCOS's
        centerness (N, 1, H, W).
        list[Boxes]: H W A anchors by level.
    """
    features = [maps[level] for level in levels_of(detector, kind)]
    if kind == "rpn":
        rpn = detector.proposal_generator
        return rpn.rpn_head(features), rpn.anchor_generator(features)
    return detector.head(features), detector.anchor_generator(features)


def predict_proposals(
    detector: Any, maps: Dict[str, Tensor], proposals: Sequence[List[Boxes]]
) -> List[Tuple[Tensor, Tensor]]:
    """What the stages of a box head predict, each for proposals of its own.

    Args:
        detector (nn.Module): with a box head.
        maps (dict[str, Tensor]): level -> (N, C, H, W), of its backbone.
        proposals (sequence[list[Boxes]]): stage -> image -> boxes, for so many of the stages.

    Returns:
        list[(Tensor, Tensor)]: by stage, logits (R, K + 1) and deltas (R, K 4) or (R, 4).
    """
    heads = detector.roi_heads
    features = [maps[level] for level in heads.in_features]
    predictions = []
    for stage, (predictor, boxes) in enumerate(zip(box_predictors(detector), proposals)):
        if hasattr(heads, "res5"):
            pooled = heads.res5(heads.pooler(features, boxes)).mean(dim=(2, 3))
        else:
            head = heads.box_head
            head = head[stage] if isinstance(heads.box_predictor, nn.ModuleList) else head
            pooled = head(heads.box_pooler(features, boxes))
        predictions.append(predictor(pooled))
    return predictions


def split_subnet(subnet: nn.Sequential, convolutions: int) -> Tuple[nn.Sequential, nn.Sequential]:
    """The blocks of a dense head's subnet up to and after so many convolutions."""
    count = sum(isinstance(x, nn.Conv2d) for x in subnet)
    entries = len(subnet) // max(count, 1) * convolutions
    return subnet[:entries], subnet[entries:]


def continue_head(
    detector: Any, features: Sequence[List[Tensor]], convolutions: int
) -> Tuple[List[Tensor], List[Tensor]]:
    """What the rest of a dense head predicts from features of another head.

    Args:
        detector (nn.Module): with a dense head.
        features (sequence[list[Tensor]]): of the subnets of classes and boxes, (N, C, H, W) by
            level.
        convolutions (int): after how many convolutions of the subnets the features were taken.

    Returns:
        list[Tensor], list[Tensor]: logits and deltas, as :func:`predict_anchors` has them.
    """
    head = detector.head
    parts = ((head.cls_subnet, head.cls_score), (head.bbox_subnet, head.bbox_pred))
    logits, deltas = (
        [last(split_subnet(subnet, convolutions)[1](x)) for x in levels]
        for (subnet, last), levels in zip(parts, features)
    )
    return logits, deltas
