"""What names a teacher: a config, a checkpoint and overrides."""

import logging
import os
from dataclasses import dataclass
from typing import Any, ContextManager, Dict, List, Sequence, Tuple, cast

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from omegaconf import ListConfig, OmegaConf

from ssimkd.checkpoint.coverage import load_detector_weights
from ssimkd.checkpoint.reader import fetch
from ssimkd.data.datasets import use_own_data
from ssimkd.errors import ConfigError, as_config_error, as_setting_error
from ssimkd.utils.compat import model_zoo
from ssimkd.utils.config_files import find_config, find_shipped, load_config
from ssimkd.utils.config_keys import without_pretraining
from ssimkd.utils.log_files import without_warnings
from ssimkd.utils.validate import check_switches

from .network import AUTO, PRECISIONS

logger = logging.getLogger(__name__)
# Settings of a teacher's config that only its own training or evaluation reads, .yaml and .py
IGNORED = (
    "INPUT.",
    "DATALOADER.",
    "SOLVER.",
    "MODEL.WEIGHTS",
    "dataloader.",
    "optimizer",
    "train.",
)
USED = ("INPUT.FORMAT", "mapper.image_format", "dataset.names")  # read all the same


@dataclass
class TeacherSpec:
    """Names a teacher. Nothing is read or built before a method is called.

    Attributes:
        config (str or Path): a `.yaml` or `.py` file, or a name that `find_config` finds, in
            Detectron2's zoo or among this project's configs.
        weights (str or Path): path or URL; "" is the zoo's checkpoint for `config`.
        opts (sequence[str]): overrides of the config, in the syntax of its kind.
        precision (str): of backbone and neck: "float32", "bfloat16" or "float16"; "auto": that of
            the student, which is half precision only in mixed precision.
        compile (bool): run backbone and neck through torch.compile.

    Raises:
        ConfigError: `precision` is unknown, or `compile` is not a truth value.
    """

    config: str
    weights: str = ""
    opts: Sequence = ()
    precision: str = AUTO
    compile: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.opts, ListConfig):  # from a LazyConfig
            self.opts = cast(List, OmegaConf.to_container(self.opts))
        for name in ("config", "weights"):
            with as_config_error(f"MODEL.DISTILL.TEACHER.{name.upper()}", TypeError):
                setattr(self, name, os.fspath(getattr(self, name)))
        if self.precision not in (AUTO, *PRECISIONS):
            raise ConfigError(
                f"MODEL.DISTILL.TEACHER.PRECISION must be one of {', '.join((AUTO, *PRECISIONS))}, "
                f"got {self.precision!r}"
            )
        check_switches(**{"MODEL.DISTILL.TEACHER.COMPILE": self.compile})

    def load_config(self):
        """The teacher's config, a CfgNode (`.yaml`) or a DictConfig (`.py`).

        Raises:
            ConfigError: there is no such config, or an override does not apply.
        """
        if not self.config:
            raise ConfigError(
                "MODEL.DISTILL.TEACHER.CONFIG is empty: name a config of Detectron2's zoo, such as "
                "COCO-Detection/faster_rcnn_R_101_FPN_3x, or a path"
            )
        with as_config_error("MODEL.DISTILL.TEACHER.CONFIG"):
            path = find_config(self.config)
        with as_config_error("MODEL.DISTILL.TEACHER.CONFIG or .OPTS"):
            cfg = load_config(path, self.opts)
            with without_warnings("ssimkd"):  # its data is not learned from
                use_own_data(cfg, ())  # its number of classes may be that of its data
        return without_pretraining(cfg)  # the checkpoint holds all of its weights

    def warn_of_ignored(self) -> None:
        """Warns of overrides that change nothing of a teacher."""
        lazy = find_config(self.config).endswith(".py")
        keys = [str(x).partition("=")[0].lstrip("+~") for x in self.opts[:: 1 if lazy else 2]]
        ignored = [key for key in keys if key.startswith(IGNORED) and not key.endswith(USED)]
        if ignored:
            logger.warning(
                "MODEL.DISTILL.TEACHER.OPTS: %s has no effect: the teacher sees the student's "
                "images, and its checkpoint is TEACHER.WEIGHTS",
                ", ".join(ignored),
            )

    def find_weights(self) -> str:
        """Local path of the checkpoint. A checkpoint at a URL is downloaded once.

        Raises:
            ConfigError: no checkpoint is named and the zoo has none, or it cannot be fetched.
        """
        weights = self.weights or self._zoo_weights()
        with as_config_error("MODEL.DISTILL.TEACHER.WEIGHTS"):
            path = fetch(find_shipped(weights))
        if not os.path.isfile(path):
            raise ConfigError(f"MODEL.DISTILL.TEACHER.WEIGHTS: there is no file {weights}")
        return path

    def output_shape(self) -> Dict[str, ShapeSpec]:
        """Channels and stride of the teacher's maps, by level, without its weights."""
        cfg = self.load_config()
        with self._building():
            if isinstance(cfg, CfgNode):
                return build_backbone(cfg).output_shape()
            return instantiate(cfg.model.backbone).output_shape()

    def build(self, cfg, device: torch.device) -> Any:
        """The detector of `cfg`, which :meth:`load_config` returns, with random weights."""
        with self._building():
            if isinstance(cfg, CfgNode):
                cfg = cfg.clone()
                cfg.MODEL.DEVICE = str(device)
                return build_model(cfg)
            return instantiate(cfg.model).to(device)

    def load(self, device: torch.device) -> Tuple[Any, Any, List[str]]:
        """The whole detector with its weights, frozen.

        Returns:
            (nn.Module, CfgNode or DictConfig, list[str]): the detector, its config, and the tensors
            of the heads that the checkpoint does not hold.

        Raises:
            ConfigError: the config or the checkpoint cannot be read, or the checkpoint does not
                hold every tensor of the backbone with its shape and with finite values.
        """
        cfg = self.load_config()
        weights = self.find_weights()
        with torch.random.fork_rng(devices=[]):  # the student's random numbers stay the same
            model = self.build(cfg, device)
        for part in ("backbone", "preprocess_image"):
            if not hasattr(model, part):
                raise ConfigError(
                    f"MODEL.DISTILL.TEACHER.CONFIG: {self.config}: a {type(model).__name__} has no "
                    f"{part}, so it cannot be a teacher"
                )
        return model.eval().requires_grad_(False), cfg, load_detector_weights(model, weights)

    def _building(self) -> ContextManager[None]:
        return as_setting_error(f"MODEL.DISTILL.TEACHER.CONFIG: cannot build {self.config}")

    def _zoo_weights(self) -> str:
        try:
            return model_zoo.get_checkpoint_url(self.config)
        except RuntimeError as error:
            raise ConfigError(
                "MODEL.DISTILL.TEACHER.WEIGHTS is empty and Detectron2's zoo has no checkpoint for "
                + self.config
            ) from error
