"""INHERIT: modules of a student start from their teacher's weights (ICD, Kang et al. 2021)."""

import logging
from typing import Dict, List, Sequence, Tuple

from torch import Tensor, nn

from ssimkd.errors import ConfigError

logger = logging.getLogger(__name__)
KEY = "MODEL.DISTILL.INHERIT"
NECK = "neck"  # the backbone without its bottom-up part
BOTTOM_UP = ("backbone.bottom_up.", "backbone.net.")  # of FPNs, and of ViTDet's pyramid
LISTED = 8  # tensors that an error lists


def inherit(
    student: nn.Module, teacher: nn.Module, modules: Sequence[str], missing: Sequence[str]
) -> List[str]:
    """Copies the teacher's weights into modules of the student, in place.

    Args:
        student (nn.Module): its modules change.
        teacher (nn.Module): the whole detector, with its heads.
        modules (sequence[str]): see :func:`tensors_of`.
        missing (sequence[str]): tensors of the teacher that its checkpoint does not hold.

    Returns:
        list[str]: names of the tensors that were copied.

    Raises:
        ConfigError: the student has no such module, or its tensors do not have the names and shapes
            of the teacher's. In this case nothing is copied.
    """
    pairs: Dict[str, Tuple[Tensor, Tensor]] = {}
    for module in modules:
        own, given = tensors_of(student, module), tensors_of(teacher, module)
        if not own:
            has = [name for name, child in student.named_children() if name != "distiller"]
            has = [NECK] * bool(tensors_of(student, NECK)) + has
            raise ConfigError(
                f"{KEY}: the student has no weights in {module!r}; it has {', '.join(has)}"
            )
        lost = sorted(set(missing) & set(given))
        if lost:
            raise ConfigError(
                f"{KEY}: {module}: the teacher's checkpoint does not hold {', '.join(lost[:3])} in "
                "the shape of the teacher's config"
            )
        wrong = differences(own, given)
        if wrong:
            more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
            raise ConfigError(f"{KEY}: {module} does not fit: {'; '.join(wrong[:LISTED])}{more}")
        pairs.update({name: (tensor, given[name]) for name, tensor in own.items()})
    for tensor, value in pairs.values():  # the tensors of a state_dict are the module's own
        tensor.copy_(value)
    logger.info("The student starts with the teacher's %s", ", ".join(modules))
    return list(pairs)


def tensors_of(detector: nn.Module, module: str) -> Dict[str, Tensor]:
    """Parameters and buffers of one module, by their names in the detector.

    Args:
        detector (nn.Module): teacher or student.
        module (str): "neck", or a name as in `named_modules`, such as "roi_heads.box_head".
    """
    tensors = detector.state_dict()
    if module != NECK:
        return {name: tensor for name, tensor in tensors.items() if name.startswith(module + ".")}
    if not any(name.startswith(BOTTOM_UP) for name in tensors):
        return {}  # a backbone that returns one map has no neck
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith("backbone.") and not name.startswith(BOTTOM_UP)
    }


def differences(student: Dict[str, Tensor], teacher: Dict[str, Tensor]) -> List[str]:
    """A text for each tensor that only one of them has, or whose shapes differ."""

    def shape(tensors: Dict[str, Tensor], name: str) -> str:
        return str(tuple(tensors[name].shape)) if name in tensors else "absent"

    return [
        f"{name} is {shape(student, name)} in the student and {shape(teacher, name)} in the teacher"
        for name in {**student, **teacher}
        if shape(student, name) != shape(teacher, name)
    ]
