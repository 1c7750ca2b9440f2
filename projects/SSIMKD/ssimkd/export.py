"""A student for stock Detectron2: its weights and config without a trace of the distillation."""

import copy
import logging
import os
import tempfile
from typing import Any, Dict, Tuple

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from omegaconf import OmegaConf
from torch import Tensor, nn

from .checkpoint_file import CheckpointReader
from .checkpointer import whole_file
from .config import OWN_KEYS
from .errors import ConfigError, one_line
from .lazy import target_of
from .meta_arch import DistillMixin

logger = logging.getLogger(__name__)
PREFIX = "distiller."


def export_student(cfg, state_dict: Dict[str, Tensor], folder: str) -> Tuple[str, str]:
    """Writes `student.pth` and `student.yaml`, which plain Detectron2 reads.

    Args:
        cfg (CfgNode or DictConfig): the config of the distilled run, or of a plain detector.
        state_dict (dict[str, Tensor]): its model's.
        folder (str): where the two files go.

    Returns:
        (str, str): paths of the checkpoint and the config. A CfgNode becomes a config for
        `DefaultPredictor`, a DictConfig one for `LazyConfig.load`.

    Raises:
        ConfigError: the weights are not exactly those of the parent detector; or, once they are
            written, see :func:`check_exportable`.
    """
    weights = {k: v.detach().cpu() for k, v in state_dict.items() if not k.startswith(PREFIX)}
    paths = os.path.join(folder, "student.pth"), os.path.join(folder, "student.yaml")
    plain = plain_config(cfg, os.path.abspath(paths[0]))
    check_weights(plain, weights)
    os.makedirs(folder, exist_ok=True)
    # Written beside and renamed: an interrupted export leaves what was there.
    with whole_file(paths[0]) as file:
        torch.save({"model": weights, "__author__": "SSIMKD"}, file)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        os.replace(write_config(plain, draft), paths[1])
    logger.info("Student for stock Detectron2: %s and %s", *paths)
    return paths


def check_exportable(cfg) -> None:
    """Raises ConfigError where a config holds what `student.yaml` could not, such as a lambda."""
    with tempfile.TemporaryDirectory() as draft:
        write_config(plain_config(cfg, ""), draft)


def write_config(plain, folder: str) -> str:
    """Writes `student.yaml`, which is read once; returns its path."""
    path = os.path.join(folder, "student.yaml")
    if isinstance(plain, CfgNode):
        with open(path, "w") as f:
            f.write(plain.dump())
        return path
    LazyConfig.save(plain, path)
    try:
        LazyConfig.load(path)
    except Exception as error:
        raise ConfigError(
            "model: student.yaml cannot be written: YAML cannot express what the node holds, such "
            f"as a lambda; import it by a name from a module instead ({one_line(error)})"
        ) from error
    return path


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
    plain.model.pop("distiller", None)
    plain.train.init_checkpoint = weights
    return plain


def parent_of(meta_arch: Any) -> Any:
    """The detector that a student class distils; anything else that builds one is its own."""
    classes = getattr(meta_arch, "__mro__", ())
    return next((cls for cls in classes if not issubclass(cls, DistillMixin)), meta_arch)


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
