"""A student for stock Detectron2: its weights and config without a trace of the distillation."""

import copy
import logging
import os
from contextlib import suppress
from typing import Any, Dict, List, Tuple

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from omegaconf import OmegaConf
from torch import Tensor, nn

from ssimkd.config import OWN_KEYS
from ssimkd.errors import ConfigError, one_line
from ssimkd.utils.atomic import atomic_write
from ssimkd.utils.config_keys import target_of

from .reader import CheckpointReader

logger = logging.getLogger(__name__)
PREFIX = "distiller."


def export_student(cfg, state_dict: Dict[str, Tensor], folder: str) -> Tuple[str, str]:
    """Writes `student.pth` and `student.yaml`, which plain Detectron2 reads.

    Where YAML cannot express a LazyConfig, a warning says so and there is no `student.yaml`.

    Args:
        cfg (CfgNode or DictConfig): the config of the distilled run, or of a plain detector.
        state_dict (dict[str, Tensor]): its model's.
        folder (str): where the two files go.

    Returns:
        (str, str): paths of the checkpoint and the config. A CfgNode becomes a config for
        `DefaultPredictor`, a DictConfig one for `LazyConfig.load`.

    Raises:
        ConfigError: the weights are not exactly those of the parent detector.
        OSError: the folder cannot be written.
    """
    weights = {k: v.detach().cpu() for k, v in state_dict.items() if not k.startswith(PREFIX)}
    paths = os.path.join(folder, "student.pth"), os.path.join(folder, "student.yaml")
    plain = plain_config(cfg, os.path.abspath(paths[0]))
    check_weights(plain, weights)
    os.makedirs(folder, exist_ok=True)
    # Written beside and renamed: an interrupted export leaves what was there.
    with atomic_write(paths[0]) as file:
        torch.save({"model": weights, "__author__": "SSIMKD"}, file)
    reason = write_config(plain, folder)
    if reason:
        logger.warning("Student: %s, without a student.yaml: %s", paths[0], reason)
    else:
        logger.info("Student for stock Detectron2: %s and %s", *paths)
    return paths


def warn_unless_exportable(cfg, folder: str) -> None:
    """Warns of a LazyConfig for which no `student.yaml` will be written; tries it in `folder`."""
    reason = write_config(plain_config(cfg, ""), folder, trial=True)
    if reason:
        logger.warning("student.pth will be written, student.yaml will not: %s", reason)


def write_config(plain, folder: str, trial: bool = False) -> str:
    """Writes `student.yaml` and reads it back.

    Args:
        plain (CfgNode or DictConfig): of :func:`plain_config`.
        folder (str): where it goes.
        trial (bool): leave what is there as it is.

    Returns:
        str: why YAML cannot express the config, so that none is there, nor an older one; "" if
        it can.
    """
    path, draft = (os.path.join(folder, name) for name in ("student.yaml", "student.tmp.yaml"))
    try:
        if isinstance(plain, CfgNode):
            with open(draft, "w") as f:
                f.write(plain.dump())
            reason = ""
        else:
            reason = save_lazy(plain, draft)
        if not trial:
            remove(path) if reason else os.replace(draft, path)
        return reason
    finally:
        remove(draft)
        remove(f"{draft}.pkl")  # Detectron2's, in place of what YAML cannot express


def remove(path: str) -> None:
    """Removes a file, if it is there."""
    with suppress(FileNotFoundError):
        os.remove(path)


def save_lazy(plain, path: str) -> str:
    """LazyConfig.save, read back; returns why YAML cannot express the model, "" if it can."""
    failures: List[Any] = []

    def take(record: logging.LogRecord) -> bool:  # Detectron2 logs a failure and raises none
        failures.extend(record.exc_info[1:2] if record.exc_info else ())
        return False

    upstream = logging.getLogger("detectron2.config.lazy")
    upstream.addFilter(take)
    try:
        LazyConfig.save(plain, path)
        if failures:
            raise failures[0]
        LazyConfig.load(path, "model")
    except OSError:
        raise
    except Exception as error:
        return (
            "YAML cannot express what the node model holds, such as a lambda; import it by a name "
            f"from a module instead ({one_line(error)})"
        )
    finally:
        upstream.removeFilter(take)
    return ""


def plain_config(cfg, weights: str):
    """`cfg` with the parent meta-architecture, without distillation, and with `weights`."""
    if isinstance(cfg, CfgNode):
        plain = cfg.clone()
        plain.defrost()
        name = cfg.MODEL.META_ARCHITECTURE
        plain.MODEL.META_ARCHITECTURE = parent_of(META_ARCH_REGISTRY.get(name)).__name__
        plain.MODEL.WEIGHTS = weights
        for node, key in OWN_KEYS:
            plain[node].pop(key, None)
        return plain
    # The model alone: schedules and data may hold functions, which no YAML can express.
    plain = OmegaConf.create({"train": {}}, flags={"allow_objects": True})
    plain.model = copy.deepcopy(cfg.model)
    plain.model._target_ = parent_of(target_of(plain.model))
    for argument in ("distiller", "log_gradients", "image_format"):  # of DistillMixin
        plain.model.pop(argument, None)
    plain.train.init_checkpoint = weights
    return plain


def parent_of(meta_arch: Any) -> Any:
    """The detector class that a student class extends; anything else is returned as it is."""
    plain_architecture = getattr(meta_arch, "plain_architecture", None)
    return plain_architecture() if plain_architecture else meta_arch


def check_weights(plain, weights: Dict[str, Tensor]) -> None:
    """Raises ConfigError unless `weights` are the plain detector's, by name and shape."""
    with torch.random.fork_rng(devices=[]):
        model = build_plain(plain)
    expected = {k: v.shape for k, v in model.state_dict().items()}
    found = {k: v.shape for k, v in weights.items()}
    wrong = sorted(k for k in {**expected, **found} if expected.get(k) != found.get(k))
    if wrong:
        raise ConfigError(
            f"the checkpoint is not one of this config: {len(wrong)} tensors are missing, left "
            f"over or of another shape, such as {', '.join(wrong[:3])}"
        )


def build_plain(plain) -> nn.Module:
    """The detector of a config, on the CPU."""
    if isinstance(plain, CfgNode):
        plain = plain.clone()
        plain.defrost()
        plain.MODEL.DEVICE = "cpu"
        return build_model(plain)
    return instantiate(plain.model)


def read_weights(path: str) -> Dict[str, Any]:
    """The model's tensors in a checkpoint file (`.pth` or `.pkl`), by name."""

    class Reader(CheckpointReader):
        def _load_model(self, checkpoint):
            self.found = checkpoint["model"]
            self._convert_ndarray_to_tensor(self.found)

    reader = Reader(nn.Module())
    reader.load(path)
    return reader.found
