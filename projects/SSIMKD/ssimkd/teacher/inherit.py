"""INHERIT: modules of a student that start from their teacher's weights (ICD, Kang et al. 2021)."""

import logging
from typing import Dict, List, Sequence, Tuple

from torch import Tensor, nn

from ssimkd.errors import ConfigError

logger = logging.getLogger(__name__)
KEY = "MODEL.DISTILL.INHERIT"
NECK = "neck"  # the backbone less its bottom-up part
BODIES = ("backbone.bottom_up.", "backbone.net.")  # of FPNs, and of ViTDet's pyramid
MOST = 8  # tensors that an error lists


def tensors_of(detector: nn.Module, module: str) -> Dict[str, Tensor]:
    """Parameters and buffers of a module, by their names in the detector.

    Args:
        detector (nn.Module): teacher or student.
        module (str): "neck", or a name as in `named_modules`, such as "roi_heads.box_head".
    """
    tensors = detector.state_dict()
    if module != NECK:
        return {name: tensor for name, tensor in tensors.items() if name.startswith(module + ".")}
    if not any(name.startswith(BODIES) for name in tensors):
        return {}  # one map of a backbone without neck
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith("backbone.") and not name.startswith(BODIES)
    }


def inherit(
    student: nn.Module, teacher: nn.Module, modules: Sequence[str], absent: Sequence[str]
) -> List[str]:
    """Copies the teacher's weights into modules of the student, in place.

    Args:
        student (nn.Module): its modules change.
        teacher (nn.Module): the whole detector, heads included.
        modules (sequence[str]): see :func:`tensors_of`.
        absent (sequence[str]): tensors of the teacher that its checkpoint did not hold.

    Returns:
        list[str]: names of the tensors that were copied.

    Raises:
        ConfigError: the student has no such module, or its tensors are not all the teacher's by
            name and shape. Nothing has been copied then.
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
        lost = sorted(set(absent) & set(given))
        if lost:
            raise ConfigError(
                f"{KEY}: {module}: the teacher's checkpoint does not hold {', '.join(lost[:3])} in "
                "the shape of the teacher's config"
            )
        wrong = differences(own, given)
        if wrong:
            more = f" and {len(wrong) - MOST} more" if len(wrong) > MOST else ""
            raise ConfigError(f"{KEY}: {module} does not fit: {'; '.join(wrong[:MOST])}{more}")
        pairs.update({name: (tensor, given[name]) for name, tensor in own.items()})
    for tensor, value in pairs.values():  # state_dict shares its tensors with the module
        tensor.copy_(value)
    logger.info("The student starts with the teacher's %s", ", ".join(modules))
    return list(pairs)


def differences(student: Dict[str, Tensor], teacher: Dict[str, Tensor]) -> List[str]:
    """In words, the tensors that are not in both or not of one shape."""

    def shape(tensors: Dict[str, Tensor], name: str) -> str:
        return str(tuple(tensors[name].shape)) if name in tensors else "absent"

    return [
        f"{name} is {shape(student, name)} in the student and {shape(teacher, name)} in the teacher"
        for name in {**student, **teacher}
        if shape(student, name) != shape(teacher, name)
    ]
