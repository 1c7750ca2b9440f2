"""Prepares a student before its first iteration: INHERIT, and a check of teacher and student.

A teacher that was loaded wrongly causes no error, but the student learns noise from it. So its maps
must have the shapes of the student's maps, and it should find the objects in training images.
"""

import logging
from itertools import chain
from typing import Any, Dict, List, Set, Tuple

import torch
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils import comm
from torch import nn

from ssimkd.errors import ConfigError, as_config_error, one_line
from ssimkd.modeling.distiller import Distiller
from ssimkd.modeling.idle import idle_losses
from ssimkd.modeling.paired_maps import paired_outputs
from ssimkd.modeling.several_teachers import distillers_of, naming_teacher
from ssimkd.teacher.inherit import inherit
from ssimkd.teacher.preprocessing import (
    convert_channel_order,
    image_format_of,
    training_image_format,
)
from ssimkd.utils.random_state import preserve_random_state

from .settings import DriverSettings

logger = logging.getLogger(__name__)
FOUND_IOU = 0.5  # least overlap of a detection with the object that it finds
LEAST_FOUND = 0.3  # share of the objects; a trained detector finds about twice this share


def prepare(model: Any, loader: Any, settings: DriverSettings, *, resumed: bool) -> None:
    """Lets a student inherit its teachers' weights and checks the pairs on training images.

    The model's mode, the stream of data and the random generators stay as they are.

    Args:
        model (nn.Module): a student with its weights; another model is left alone.
        loader (ResumableLoader or iterable): only a ResumableLoader can show images in advance.
        settings (DriverSettings): what is inherited, and how many images are checked.
        resumed (bool): the weights come from a checkpoint of the run, so nothing is inherited.

    Raises:
        ConfigError: a module cannot be inherited, or maps do not agree cell by cell.
    """
    distillers = distillers_of(model)
    inherits: Dict[str, List[str]] = {} if resumed else settings.inherit
    if not any(distiller.enabled for _, distiller in distillers):
        for number, (name, _) in enumerate(distillers):
            warn_of_disabled(name, number == 0 and any(inherits.values()))
        return
    check_names(settings, [name for name, _ in distillers])
    inherited: Set[str] = set()
    with preserve_random_state():
        batches = batches_to_check(loader, settings.check_images)
        for name, distiller in distillers:
            modules = inherits.get(name, [])
            if not distiller.enabled:
                warn_of_disabled(name, bool(modules))
                continue
            with naming_teacher(name):
                copied = prepare_pair(model, name, distiller, modules, batches, settings)
                twice = sorted(inherited & copied)
                if twice:
                    raise ConfigError(f"MODEL.DISTILL.INHERIT: two teachers both set {twice[0]}")
                inherited |= copied


def batches_to_check(loader: Any, images: int) -> List[List[Dict]]:
    """The first batches of the training, on the main process; none if `images` is 0."""
    if images == 0 or not comm.is_main_process():
        return []
    if hasattr(loader, "peek"):
        return loader.peek(images)
    logger.warning(
        "Teacher and student are not checked before the training, because the loader is not "
        "Detectron2's own but a %s",
        type(loader).__name__,
    )
    return []


def prepare_pair(
    model: Any,
    name: str,
    distiller: Distiller,
    modules: List[str],
    batches: List[List[Dict]],
    settings: DriverSettings,
) -> Set[str]:
    """Lets a student inherit from one teacher, and checks the two; see :func:`check_pair`.

    Args:
        modules (list[str]): what the student inherits.
        batches (list[list[dict]]): training images with "instances"; []: nothing is checked.

    Returns:
        set[str]: names of the tensors that the student inherited.
    """
    warn_of_settings(name, distiller, settings.iterations)
    if not (modules or batches):
        return set()
    teacher = detector, _, absent = distiller.spec.load(model.device)
    copied = set(inherit(model, detector, modules, absent)) if modules else set()
    if batches:
        check_pair(model, name, distiller, batches, teacher)
    return copied


def warn_of_disabled(name: str, inherits: bool) -> None:
    """Logs that a student learns nothing from a teacher, and warns if it was to inherit from it."""
    who = f"the teacher {name}".rstrip()
    logger.info("MODEL.DISTILL.LOSSES is (): the student learns nothing from %s", who)
    if inherits:
        logger.warning("INHERIT has no effect, because LOSSES is ()")


def warn_of_settings(name: str, distiller: Distiller, iterations: int) -> None:
    """Warns of settings that keep a teacher from the student, and of a schedule beyond the run.

    Args:
        name (str): the teacher's; "" if there is one teacher.
        distiller (Distiller): the teacher's, with losses.
        iterations (int): of the run.
    """
    idle, schedule = idle_losses(distiller, iterations), distiller.schedule
    distils = schedule.iterations(iterations)
    logged = {loss for loss, one in distiller.losses.items() if one.weight == 0}  # and no more
    if set(idle) - logged or len(idle) == len(distiller.losses):
        why = "; ".join(f"{loss}: {reason}" for loss, reason in idle.items())
        who = f"the teacher {name}".rstrip()
        logger.warning("In this run the student learns nothing from %s by %s", who, why)
    elif schedule.warmup > distils:
        logger.warning(
            "MODEL.DISTILL.WARMUP_ITERS is %d, and the run distils in %d iterations: the losses "
            "never get their whole weight",
            schedule.warmup,
            distils,
        )
    if schedule.stop > iterations:
        logger.warning(
            "MODEL.DISTILL.STOP_ITER is %d, and the run has %d iterations: the run ends before "
            "the distillation does",
            schedule.stop,
            iterations,
        )


def check_names(settings: DriverSettings, teachers: List[str]) -> None:
    """Raises ConfigError for a name that INHERIT gives to no teacher of a student."""
    for name, modules in settings.inherit.items():
        if modules and name not in teachers:
            how = "there is one teacher: write a list of modules"
            if teachers != [""]:
                known = ", ".join(teachers)
                how = f"write a mapping from the name of a teacher ({known}) to a list of modules"
            raise ConfigError(f"INHERIT: {name!r} is not the name of a teacher; {how}")


def check_pair(
    model: Any,
    name: str,
    distiller: Distiller,
    batches: List[List[Dict]],
    teacher: Tuple[nn.Module, Any, List[str]],
) -> None:
    """Checks one teacher and the student on the first training images.

    Args:
        model (nn.Module): the student.
        name (str): the teacher's name; "" where there is one teacher.
        distiller (Distiller): the teacher's.
        batches (list[list[dict]]): images with "instances".
        teacher (tuple): what :meth:`TeacherSpec.load` returned.
    """
    detector, cfg, absent = teacher
    who = f"The teacher {name}".rstrip()
    shapes = check_maps(model, distiller, batches[0])
    if shapes:
        logger.info("%s and student agree cell by cell: %s", f"Teacher {name}".rstrip(), shapes)
    if absent:
        logger.warning(
            "%s's detections cannot be checked: its checkpoint does not hold %s in the shape that "
            "its config gives it (another number of classes? MODEL.DISTILL.TEACHER.OPTS sets it)",
            who,
            absent[0],
        )
        return
    shown, wanted = image_format_of(model), training_image_format(cfg, detector)
    check_detections(who, detector, list(chain(*batches)), shown, wanted)


def check_maps(model: Any, distiller: Distiller, batch: List[Dict]) -> str:
    """The shapes of the maps, in words. Raises ConfigError unless teacher and student agree."""
    what = (
        f"MODEL.DISTILL.TEACHER.CONFIG: {distiller.spec.config} or the student cannot run here, "
        "because an operator that Detectron2 compiles is missing"
    )
    with as_config_error(what, (ImportError, NotImplementedError)):
        student, *_ = paired_outputs(model, distiller, batch)
    return ", ".join(f"{level} {tuple(maps.shape[1:])}" for level, maps in student.items())


@torch.no_grad()
def check_detections(
    who: str, detector: nn.Module, batch: List[Dict], shown: str, wanted: str
) -> None:
    """Logs how many objects of a batch a teacher finds; warns if it finds few.

    Args:
        who (str): the teacher, in words.
        detector (nn.Module): the whole teacher.
        batch (list[dict]): images with "instances".
        shown (str): channel order of the images.
        wanted (str): channel order of the images that the teacher was trained on.
    """
    found = total = 0
    try:
        for x in batch:
            image = convert_channel_order([x["image"]], shown, wanted)[0]
            detections = detector([{"image": image}])[0]["instances"]
            found += count_found(detections, x["instances"].to(detections.scores.device))
            total += len(x["instances"])
    except Exception as error:  # a teacher without boxes can still be distilled
        logger.warning("%s's detections cannot be checked: %s", who, one_line(error))
        return
    if not total:
        logger.warning("%s's detections cannot be checked: no objects in the images", who)
        return
    text = f"{who} finds {found} of {total} objects in {len(batch)} training images"
    if found >= LEAST_FOUND * total:
        logger.info(text)
    else:
        logger.warning(
            "%s, fewer than %.0f %%, so the student may learn noise. Check that "
            "MODEL.DISTILL.TEACHER.WEIGHTS belong to .CONFIG, and that the teacher was trained on "
            "similar images",
            text,
            100 * LEAST_FOUND,
        )


def count_found(detections: Instances, targets: Instances) -> int:
    """The number of objects that the best detections overlap; of n objects, the n best count."""
    best = detections.scores.argsort(descending=True)[: len(targets)]
    iou = pairwise_iou(targets.gt_boxes, detections.pred_boxes[best])
    return int((iou >= FOUND_IOU).any(dim=1).sum())
