"""The Distillers of a student: one, or one for each of several teachers."""

from contextlib import nullcontext
from typing import (
    Any,
    ContextManager,
    Dict,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
    cast,
)

from detectron2.config import CfgNode, instantiate
from detectron2.layers import ShapeSpec
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ssimkd.errors import ConfigError, as_config_error
from ssimkd.utils.config_files import merge_overrides
from ssimkd.utils.lazy_fields import naming_lazy_fields

from .backbones import check_pixels
from .distiller import Captured, Distiller
from .predictions import HeadOutputs

# What an entry of MODEL.DISTILL.TEACHERS may hold besides the keys of TEACHER and NAME.
OWN_SETTINGS = ("IN_FEATURES", "LEVEL_WEIGHTS", "ADAPTER", "LOSSES", "INHERIT")


class Distillers(nn.ModuleDict):
    """Computes the distillation losses of one student and several teachers.

    The losses of a teacher called x are "<loss>_kd_loss_x", and its log is `x/<loss>_kd/<level>`.
    Its trainable parts are below `distiller.x.`.

    Args:
        distillers (Distiller): each under the name of its teacher.

    Raises:
        ConfigError: there is no teacher, or a name is not allowed for a module.
    """

    def __init__(self, /, **distillers: Distiller) -> None:
        if not distillers:
            raise ConfigError("MODEL.DISTILL.TEACHERS is empty")
        try:
            super().__init__(distillers)
        except (KeyError, TypeError) as error:
            raise ConfigError(
                "MODEL.DISTILL.TEACHERS: a NAME must not be empty, have a dot, or be an attribute "
                f"of nn.ModuleDict, and in a .py each entry is a Distiller: {error}"
            ) from error

    @property
    def enabled(self) -> bool:
        """Whether there is anything to distil."""
        return any(distiller.enabled for _, distiller in self.named())

    def attach(
        self,
        student_shapes: Dict[str, ShapeSpec],
        num_classes: int = 0,
        detector: Any = None,
    ) -> None:
        """See :meth:`Distiller.attach`."""
        for name, distiller in self.named():
            with naming_teacher(name):
                distiller.attach(student_shapes, num_classes, detector)

    def forward(
        self,
        labeled: Captured,
        outputs: Optional[HeadOutputs] = None,
        unlabeled: Optional[Captured] = None,
    ) -> Dict[str, Tensor]:
        """See :meth:`Distiller.forward`; "<loss>_kd_loss_<name>" -> scalar."""
        losses = {}
        for name, distiller in self.named():
            if distiller.enabled:
                with naming_teacher(name), get_event_storage().name_scope(name):
                    own = distiller(labeled, outputs, unlabeled)
                losses.update({f"{key}_{name}": value for key, value in own.items()})
        return losses

    def named(self) -> List[Tuple[str, Distiller]]:
        """The names of the teachers and their Distillers."""
        return cast(List[Tuple[str, Distiller]], [*self.items()])


def named(distiller: Any) -> List[Tuple[str, Distiller]]:
    """Each Distiller and the name of its teacher; the name of a single one is ""."""
    if isinstance(distiller, Distillers):
        return distiller.named()
    return [("", distiller)] if isinstance(distiller, Distiller) else []


def distillers_of(model: Any) -> List[Tuple[str, Distiller]]:
    """See :func:`named`, for a student; [] for any other model."""
    return named(getattr(model, "distiller", None))


def distillers_in(cfg) -> List[Tuple[str, Distiller]]:
    """See :func:`named`, for the student of a config, which is not built."""
    if isinstance(cfg, CfgNode):
        return named(build_distiller(cfg))
    with naming_lazy_fields():
        return named(instantiate(cfg.model.get("distiller")))


def build_teachers(model: Any, class_names: Sequence[str] = ()) -> None:
    """Builds every teacher of a student before the first step, so that a failure comes early.

    First it checks that a pretrained backbone of the student gets the images that it needs.

    Args:
        model (nn.Module): the student, or any other model.
        class_names (sequence[str]): those of its training data; (): not known.

    Raises:
        ConfigError: see :meth:`Distiller.build_teacher` and :func:`check_pixels`.
    """
    check_pixels(model)
    for name, distiller in distillers_of(model):
        with naming_teacher(name):
            distiller.build_teacher(model.device, class_names)


def write_logs(model: Any) -> None:
    """Puts what the distillers of a student have logged into the event storage, all of it."""
    for name, distiller in distillers_of(model):
        with get_event_storage().name_scope(name) if name else nullcontext():
            distiller.log.write()


def takes_unlabeled(model: Any) -> bool:
    """Whether a model learns from images without labels: a student whose losses take them.

    Raises:
        ConfigError: it has losses, and none takes them.
    """
    distillers = [distiller for _, distiller in distillers_of(model) if distiller.enabled]
    if distillers and not any(distiller.takes_unlabeled for distiller in distillers):
        raise ConfigError(
            "MODEL.DISTILL.LOSSES: none of them learns from images without labels; add one that "
            "compares maps, such as ssim, or leave out DATASETS.UNLABELED"
        )
    return bool(distillers)


def naming_teacher(name: str) -> ContextManager[None]:
    """In this block a ConfigError begins with the teacher's name, if it has one."""
    return as_config_error(name and f"MODEL.DISTILL.TEACHERS: {name}")


def build_distiller(cfg) -> Union[Distiller, Distillers]:
    """Builds what `cfg.MODEL.DISTILL` describes: one teacher, or the several of TEACHERS.

    Raises:
        ConfigError: an option is unknown or out of its range, both kinds are set, or LOSSES is
            empty and an entry of TEACHERS names losses.
    """
    node = cfg.MODEL.get("DISTILL")
    if not (node and node.TEACHERS):
        return Distiller(cfg)
    if not node.LOSSES:
        if any(isinstance(entry, Mapping) and entry.get("LOSSES") for entry in node.TEACHERS):
            raise ConfigError(
                "MODEL.DISTILL.LOSSES is () and switches off every teacher, but an entry of "
                "TEACHERS names LOSSES: name losses in MODEL.DISTILL.LOSSES, or set TEACHERS to []"
            )
        return Distiller(cfg)
    if node.TEACHER.CONFIG or node.INHERIT:
        set_too = "TEACHER.CONFIG" if node.TEACHER.CONFIG else "INHERIT"
        raise ConfigError(
            f"MODEL.DISTILL.{set_too} and .TEACHERS are both set. With several teachers it belongs "
            f"into their entries: set {set_too} to {'[]' if set_too == 'INHERIT' else repr('')}"
        )
    distillers: Dict[str, Distiller] = {}
    for number, entry in enumerate(node.TEACHERS, start=1):
        name, one = parse_teacher_entry(cfg, entry, number)
        if name in distillers:
            raise ConfigError(f"MODEL.DISTILL.TEACHERS: the NAME {name} is there twice")
        with naming_teacher(name):
            distillers[name] = Distiller(one)
    return Distillers(**distillers)


def parse_teacher_entry(cfg, entry: Mapping[str, Any], number: int) -> Tuple[str, Any]:
    """The name of the teacher in an entry of TEACHERS, and a config with this teacher alone.

    What the entry leaves out is taken from `cfg`, except WEIGHTS and OPTS, which belong to one
    CONFIG.

    Args:
        cfg (CfgNode): of the whole run.
        entry (mapping): an item of `cfg.MODEL.DISTILL.TEACHERS`.
        number (int): of the entry, from 1.

    Raises:
        ConfigError: the entry is not a mapping, or a key is unknown or of the wrong type.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"MODEL.DISTILL.TEACHERS: an entry is a mapping such as {{CONFIG: ...}}, got {entry!r}"
        )
    settings: List[Any] = ["MODEL.DISTILL.TEACHER.WEIGHTS", "", "MODEL.DISTILL.TEACHER.OPTS", []]
    teacher = cfg.MODEL.DISTILL.TEACHER
    for key, value in entry.items():
        if value is None:  # yacs would take it in place of any value
            raise ConfigError(
                f"MODEL.DISTILL.TEACHERS: {key} is None: give it a value, or leave it out"
            )
        if key in teacher:
            settings += [f"MODEL.DISTILL.TEACHER.{key}", value]
        elif key in OWN_SETTINGS:
            settings += [f"MODEL.DISTILL.{key}", value]
        elif key != "NAME":
            known = ", ".join(("NAME", *teacher, *OWN_SETTINGS))
            raise ConfigError(f"MODEL.DISTILL.TEACHERS: unknown key {key}; there are {known}")
    one = cfg.clone()
    one.defrost()
    with as_config_error("MODEL.DISTILL.TEACHERS"):
        merge_overrides(one, settings)
    return name_of_entry(entry, number), one


def name_of_entry(entry: Mapping[str, Any], number: int) -> str:
    """The name of the teacher in an entry of TEACHERS, the `number`-th one, counted from 1."""
    return str(entry.get("NAME", f"teacher{number}"))
