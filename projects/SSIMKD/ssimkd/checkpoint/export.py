"""Exports a student for stock Detectron2: weights and config without the distillation."""

import logging
import os
from contextlib import suppress
from typing import Any, Dict, Sequence, Tuple

import torch
import yaml
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import OmegaConf
from torch import Tensor, nn

from ssimkd.config import OWN_KEYS
from ssimkd.errors import ConfigError, as_setting_error, one_line
from ssimkd.utils.atomic import atomic_write
from ssimkd.utils.config_keys import BACKBONE_NODES, key_of, target_of, without_pretraining
from ssimkd.utils.lazy_fields import naming_lazy_fields
from ssimkd.utils.user_code import IMPORTED

logger = logging.getLogger(__name__)
PREFIX = "distiller."
NEEDS_PACKAGE = "# The backbone comes with the package ssimkd, which has to be installed.\n"
NEEDS_KEYS = "# Import ssimkd, and call ssimkd.add_ssimkd_config(cfg) before cfg.merge_from_file.\n"
NEEDS_WEIGHTS = "# {} names the file beside this one: set it to its path from where you are.\n"


def export_student(
    cfg, state_dict: Dict[str, Tensor], folder: str, categories: Sequence[Dict[str, Any]] = ()
) -> Tuple[str, str]:
    """Writes `student.pth` and `student.yaml`, which plain Detectron2 reads.

    If YAML cannot express a LazyConfig, a warning says so, and there is no `student.yaml`.

    Args:
        cfg (CfgNode or DictConfig): the config of the distilled run, or of a plain detector.
        state_dict (dict[str, Tensor]): the model's.
        folder (str): where the two files are written. It can be moved.
        categories (sequence[dict]): "id" and "name" of the classes, kept in `student.pth`.

    Returns:
        (str, str): paths of the checkpoint and the config. The config of a CfgNode is for
        `DefaultPredictor`, that of a DictConfig for `LazyConfig.load`.

    Raises:
        ConfigError: the weights are not exactly those of the plain detector.
        OSError: the folder cannot be written.
    """
    weights = {k: v.detach().cpu() for k, v in state_dict.items() if not k.startswith(PREFIX)}
    paths = os.path.join(folder, "student.pth"), os.path.join(folder, "student.yaml")
    plain = plain_config(cfg, os.path.basename(paths[0]))
    check_weights(plain, weights)
    warn_of_own_methods(architecture_of(cfg))
    os.makedirs(folder, exist_ok=True)
    with atomic_write(paths[0]) as file:
        run = {"categories": list(categories)}
        torch.save({"model": weights, "__author__": "SSIMKD", "run": run}, file)
    try:
        text = to_yaml(plain)
    except ConfigError as error:
        with suppress(FileNotFoundError):  # The file of an earlier run has other weights.
            os.remove(paths[1])
        logger.warning("Student: %s, without a student.yaml: %s", paths[0], error)
        return paths
    with atomic_write(paths[1], "w") as file:
        file.write(text)
    logger.info("Student without the distillation: %s and %s", *paths)
    return paths


def warn_unless_exportable(cfg) -> None:
    """Warns of a LazyConfig for which no `student.yaml` will be written."""
    try:
        to_yaml(plain_config(cfg, ""))
    except ConfigError as error:
        logger.warning("student.pth will be written, student.yaml will not: %s", error)


def to_yaml(plain) -> str:
    """The text of `student.yaml` for a config of :func:`plain_config`.

    Raises:
        ConfigError: YAML cannot express what a LazyConfig holds.
    """
    head = NEEDS_WEIGHTS.format(key_of(plain, "weights"))
    head += f"# Before that, import {', '.join(IMPORTED)}.\n" if IMPORTED else ""
    if isinstance(plain, CfgNode):
        used = any(name in plain.MODEL for name in BACKBONE_NODES)
        return (NEEDS_PACKAGE + NEEDS_KEYS if used else "") + head + plain.dump()
    try:
        text = yaml.dump(with_names(OmegaConf.to_container(plain)), default_flow_style=None)
        yaml.unsafe_load(text)  # as LazyConfig.load reads it
    except Exception as error:  # The model can hold any object, and that can raise anything.
        raise ConfigError(
            "YAML cannot express what the node model holds, such as a lambda; import it by a name "
            f"from a module instead ({one_line(error)})"
        ) from error
    return (NEEDS_PACKAGE if "_target_: ssimkd." in text else "") + head + text


def with_names(node: Any) -> Any:
    """Nested containers with the name of each function and class under `_target_`."""
    if isinstance(node, list):
        return [with_names(item) for item in node]
    if not isinstance(node, dict):
        return node
    ret = {key: with_names(value) for key, value in node.items()}
    if callable(ret.get("_target_")):
        ret["_target_"] = _convert_target_to_string(ret["_target_"])
    return ret


def plain_config(cfg, weights: str):
    """A copy of `cfg` for the plain detector of a student, with a checkpoint `weights`.

    Raises:
        ConfigError: Detectron2's registry lacks the student's class or the plain detector's.
    """
    plain = without_pretraining(cfg)
    if isinstance(plain, CfgNode):
        name = parent_of(architecture_of(cfg)).__name__
        if name not in META_ARCH_REGISTRY:
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE: {name} is not registered, so that the student cannot be "
                f"exported: put @META_ARCH_REGISTRY.register() above class {name}"
            )
        plain.MODEL.META_ARCHITECTURE = name
        plain.MODEL.WEIGHTS, plain.OUTPUT_DIR = weights, "./output"  # the export can be moved
        for node, key in OWN_KEYS:
            if not (key in BACKBONE_NODES and plain[node].get(key, {}).get("NAME")):
                plain[node].pop(key, None)
        return plain
    plain.model._target_ = parent_of(architecture_of(cfg))
    for argument in ("distiller", "log_gradients", "image_format"):  # of DistillMixin
        plain.model.pop(argument, None)
    # The model is enough. Schedules and data can hold functions, which YAML cannot express.
    content = {"model": plain.model, "train": {"init_checkpoint": weights}}
    return OmegaConf.create(content, flags={"allow_objects": True})


def architecture_of(cfg) -> Any:
    """The meta-architecture of a config: a class, or what else a LazyConfig calls."""
    if not isinstance(cfg, CfgNode):
        return target_of(cfg.model)
    with as_setting_error("MODEL.META_ARCHITECTURE"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)


def warn_of_own_methods(meta_arch: Any) -> None:
    """Warns if a student's class has methods that its plain detector lacks."""
    parent = parent_of(meta_arch)
    if parent is meta_arch:
        return
    classes = meta_arch.__mro__[: meta_arch.__mro__.index(parent)]
    own = {
        name
        for one in classes
        if "plain_architecture" not in vars(one)  # DistillMixin has it
        for name, value in vars(one).items()
        if callable(value) and not name.startswith("__")
    }
    if own:
        logger.warning(
            "The exported student is a %s and lacks these methods of %s, so that it may detect "
            "something else: %s",
            parent.__name__,
            meta_arch.__name__,
            ", ".join(sorted(own)),
        )


def parent_of(meta_arch: Any) -> Any:
    """The detector class that a student class extends; anything else is returned as it is."""
    plain_architecture = getattr(meta_arch, "plain_architecture", None)
    return plain_architecture() if plain_architecture else meta_arch


def check_weights(plain, weights: Dict[str, Tensor]) -> None:
    """Raises ConfigError unless `weights` are the plain detector's, by name and shape."""
    expected = {k: v.shape for k, v in build_detector(plain).state_dict().items()}
    found = {k: v.shape for k, v in weights.items()}
    wrong = sorted(k for k in {**expected, **found} if expected.get(k) != found.get(k))
    if wrong:
        raise ConfigError(
            f"the checkpoint is not one of this config: {len(wrong)} tensors are missing, left "
            f"over or of another shape, such as {', '.join(wrong[:3])}"
        )


def build_detector(cfg) -> nn.Module:
    """The detector of a config, on the CPU. The random generator of the CPU is not changed."""
    with torch.random.fork_rng(devices=[]):
        if not isinstance(cfg, CfgNode):
            with naming_lazy_fields(), as_setting_error("model"):
                return instantiate(cfg.model)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        with as_setting_error("MODEL"):
            return build_model(cfg)
