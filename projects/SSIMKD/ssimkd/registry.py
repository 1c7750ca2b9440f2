"""The registry of losses. `MODEL.DISTILL.LOSSES` and the training log use its names."""

import inspect
from functools import wraps
from typing import Any, Callable, Dict, TypeVar

from detectron2.utils.registry import Registry

from ssimkd.errors import ConfigError
from ssimkd.utils.lazy_fields import LAZY_FIELDS

KD_LOSS_REGISTRY = Registry("KD_LOSS")

LossClass = TypeVar("LossClass", bound=type)


def register_loss(name: str) -> Callable[[LossClass], LossClass]:
    """Registers a loss class, a subclass of `ssimkd.losses.KDLoss`, as `name`.

    The arguments of its constructor, in upper case, become the keys of `MODEL.DISTILL.<NAME>`.
    Each of them needs a default, which becomes the key's default. Errors of the constructor become
    ConfigErrors that name this node.

    Raises:
        TypeError: an argument of the constructor has no default.
    """

    def register(cls: LossClass) -> LossClass:
        loss_defaults(cls)
        construct, node = cls.__init__, f"MODEL.DISTILL.{name.upper()}"  # type: ignore[misc]
        LAZY_FIELDS[node] = f"model.distiller.losses, {name}"

        @wraps(construct)
        def init(self: Any, *args: Any, **options: Any) -> None:
            try:
                construct(self, *args, **options)
            except (OverflowError, TypeError, ValueError) as error:
                registered = KD_LOSS_REGISTRY.get(type(self).name)
                if registered is type(self) is not cls:  # a subclass, which names itself
                    raise
                raise ConfigError(f"{node}: {error}") from error

        cls.__init__ = init  # type: ignore[misc]
        cls.name = name  # type: ignore[attr-defined]
        KD_LOSS_REGISTRY._do_register(name, cls)
        return cls

    return register


def loss_defaults(cls: type) -> Dict[str, Any]:
    """The arguments of a loss's constructor and their defaults.

    Raises:
        TypeError: an argument has no default.
    """
    defaults: Dict[str, Any] = {}
    for key, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            raise TypeError(
                f"{cls.__name__}: the argument {key} needs a default, "
                "from which its key in MODEL.DISTILL is made"
            )
        is_float = parameter.annotation in (float, "float")
        defaults[key] = float(parameter.default) if is_float else parameter.default
    return defaults
