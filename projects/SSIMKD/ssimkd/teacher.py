"""The teacher: named by a config and a checkpoint, checked, frozen, run by its own rules."""

import logging
import os
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, cast

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.file_io import PathManager
from omegaconf import ListConfig, OmegaConf
from torch import Tensor, nn

from .compat import model_zoo
from .config import add_ssimkd_config
from .errors import ConfigError, one_line

logger = logging.getLogger(__name__)


@dataclass
class TeacherSpec:
    """What names a teacher; nothing is built or read before it is asked for.

    Attributes:
        config (str): name in Detectron2's zoo, with or without suffix, or path, `.yaml` or `.py`.
        weights (str): path or URL; "" is the zoo's checkpoint for `config`.
        opts (sequence[str]): overrides of the config, in its own syntax.
    """

    config: str
    weights: str = ""
    opts: Sequence = ()

    def __post_init__(self) -> None:
        if isinstance(self.opts, ListConfig):  # from a LazyConfig
            self.opts = cast(List, OmegaConf.to_container(self.opts))

    def load_config(self):
        """The teacher's config, a CfgNode (`.yaml`) or a DictConfig (`.py`).

        Raises:
            ConfigError: no such file or zoo name, or an override that does not apply.
        """
        path = self._find_config()
        try:
            if path.endswith(".py"):
                return LazyConfig.apply_overrides(LazyConfig.load(path), list(self.opts))
            cfg = get_cfg()
            add_ssimkd_config(cfg)  # a distilled student can be the next one's teacher
            cfg.merge_from_file(path)
            cfg.merge_from_list(list(self.opts))
            return cfg
        except Exception as error:
            keys = "MODEL.DISTILL.TEACHER.CONFIG or .OPTS"
            raise ConfigError(f"{keys}: cannot load {self.config}: {one_line(error)}") from error

    def find_weights(self) -> str:
        """Local path of the checkpoint, downloaded if need be.

        Raises:
            ConfigError: none is named and the zoo has none, or it cannot be read.
        """
        weights = self.weights or self._zoo_weights()
        try:
            path = PathManager.get_local_path(weights)
        except Exception as error:
            reason = f"cannot fetch {weights}: {one_line(error)}"
            raise ConfigError(f"MODEL.DISTILL.TEACHER.WEIGHTS: {reason}") from error
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
        """The detector of `cfg` with random weights."""
        with self._building():
            if isinstance(cfg, CfgNode):
                cfg = cfg.clone()
                cfg.MODEL.DEVICE = str(device)
                return build_model(cfg)
            return instantiate(cfg.model).to(device)

    def load(self, device: torch.device) -> Tuple[Any, Any, List[str]]:
        """The whole detector with its weights.

        Returns:
            nn.Module: the detector.
            CfgNode or DictConfig: its config.
            list[str]: tensors of the heads that the checkpoint does not hold.

        Raises:
            ConfigError: the config or checkpoint cannot be read, or the checkpoint does not hold
                every tensor of the backbone in its shape and finite.
        """
        cfg = self.load_config()
        weights = self.find_weights()
        with torch.random.fork_rng(devices=[]):  # the student's run must not depend on it
            model = self.build(cfg, device)
        if not hasattr(model, "backbone"):
            raise ConfigError(
                f"MODEL.DISTILL.TEACHER.CONFIG: {self.config} has no backbone to learn from"
            )
        return model.eval().requires_grad_(False), cfg, _load(model, weights)

    @contextmanager
    def _building(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = f"cannot build {self.config}: {one_line(error)}"
            raise ConfigError(f"MODEL.DISTILL.TEACHER.CONFIG: {reason}") from error

    def _find_config(self) -> str:
        if not self.config:
            raise ConfigError(
                "MODEL.DISTILL.TEACHER.CONFIG is empty: name a config of Detectron2's zoo, such as "
                "COCO-Detection/faster_rcnn_R_101_FPN_3x, or a path"
            )
        if PathManager.isfile(self.config):
            return self.config
        for suffix in ("", ".yaml", ".py"):
            try:
                path = model_zoo.get_config_file(self.config + suffix)
            except RuntimeError:  # not in the zoo
                continue
            if os.path.isfile(path):
                return path
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.CONFIG: {self.config} is neither a file nor in Detectron2's zoo"
        )

    def _zoo_weights(self) -> str:
        try:
            return model_zoo.get_checkpoint_url(self.config)
        except RuntimeError as error:
            raise ConfigError(
                "MODEL.DISTILL.TEACHER.WEIGHTS is empty and Detectron2's zoo has no checkpoint for "
                f"{self.config or 'an empty MODEL.DISTILL.TEACHER.CONFIG'}"
            ) from error


class Teacher:
    """A frozen detector of which only backbone and neck run.

    It is no nn.Module: so it is in no `parameters()`, checkpoint or DDP bucket of a module that
    holds it, and no `train()` reaches it.

    Args:
        spec (TeacherSpec): what to build and load.
        device (torch.device): where it starts; it follows its inputs later.

    Raises:
        ConfigError: the config or checkpoint cannot be read, or the checkpoint does not hold every
            tensor of the backbone in its shape and finite.
    """

    def __init__(self, spec: TeacherSpec, device: torch.device) -> None:
        model, cfg, _ = spec.load(device)
        self.input_format = trained_format(cfg, model)
        self.shapes: Dict[str, ShapeSpec] = model.backbone.output_shape()
        for name, _ in list(model.named_children()):
            if name != "backbone":
                delattr(model, name)  # the heads never run: their memory is free
        self.model = model

    def __deepcopy__(self, memo) -> "Teacher":
        return self  # constant: copies of a student share it

    @torch.no_grad()
    def __call__(
        self, batched_inputs: List[Dict], input_format: str, device: torch.device
    ) -> Tuple[Dict[str, Tensor], Tuple[int, int]]:
        """Runs backbone and neck on a batch of the student's.

        Args:
            batched_inputs (list[dict]): "image" is (3, H, W) in [0, 255].
            input_format (str): channel order of these images, "BGR" or "RGB".
            device (torch.device): where the maps are wanted.

        Returns:
            dict[str, Tensor]: level -> (N, C, H, W).
            (int, int): height and width of the padded images, in pixels.
        """
        if self.model.pixel_mean.device != device:
            self.model.to(device)
        images = as_seen([x["image"] for x in batched_inputs], input_format, self.input_format)
        batch = self.model.preprocess_image([{"image": image} for image in images]).tensor
        return self.model.backbone(batch), tuple(batch.shape[-2:])


def as_seen(images: List[Tensor], shown: str, wanted: str) -> List[Tensor]:
    """Images (3, H, W) in the channel order `shown` ("BGR" or "RGB"), turned to that of `wanted`.

    Raises:
        ConfigError: `shown` is another format.
    """
    if shown not in ("BGR", "RGB"):
        raise ConfigError(
            f"INPUT.FORMAT (.yaml) or model.input_format (.py): images in {shown!r} cannot be "
            f"shown to a teacher for {wanted}; use BGR or RGB"
        )
    return images if shown == wanted else [image.flip(0) for image in images]


def trained_format(cfg, model: nn.Module) -> str:
    """Channel order of the images that a detector was trained on.

    Raises:
        ConfigError: its config does not say, or names another format than BGR and RGB.
    """
    if isinstance(cfg, CfgNode):
        found: Optional[str] = cfg.INPUT.FORMAT
    else:
        found = OmegaConf.select(cfg, "dataloader.train.mapper.image_format")
        found = found or getattr(model, "input_format", None)
    if found not in ("BGR", "RGB"):
        raise ConfigError(
            f"MODEL.DISTILL.TEACHER.OPTS: the teacher's image format is {found!r}; set "
            "INPUT.FORMAT (.yaml) or dataloader.train.mapper.image_format (.py) to BGR or RGB"
        )
    return found


class _WholeBackbone(DetectionCheckpointer):
    """Loads a checkpoint and raises unless it covers the backbone; the heads may differ.

    Attributes:
        absent (list[str]): tensors of the heads that keep their random values.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.absent: List[str] = []

    def _load_model(self, checkpoint):
        weights = checkpoint["model"]
        if not hasattr(weights, "_metadata") and any(k.endswith("running_var") for k in weights):
            # Without a version FrozenBN takes 0 and 1 for statistics that a file lacks. That is
            # right for a file without any, such as Caffe2's, whose scale and bias hold them.
            checkpoint["model"] = weights = OrderedDict(weights)
            weights._metadata = {
                name: {"version": module._version}
                for name, module in self.model.named_modules()
                if isinstance(module, FrozenBatchNorm2d)
            }
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible) -> None:
        wrong = {name: f"{name} is missing" for name in incompatible.missing_keys}
        wrong.update(
            (name, f"{name} is {tuple(found)} instead of {tuple(expected)}")
            for name, found, expected in incompatible.incorrect_shapes
        )
        # counters of training steps have no effect on a frozen network
        wrong = {k: v for k, v in wrong.items() if not k.endswith("num_batches_tracked")}
        backbone = [text for name, text in wrong.items() if name.startswith("backbone.")]
        if backbone:
            more = f" and {len(backbone) - 3} more" if len(backbone) > 3 else ""
            raise ConfigError(
                f"does not fit the teacher's backbone: {'; '.join(backbone[:3])}{more}"
            )
        self.absent = list(wrong)


def _load(model: Any, weights: str) -> List[str]:
    key = "MODEL.DISTILL.TEACHER.WEIGHTS"
    checkpointer = _WholeBackbone(model)
    try:
        checkpointer.load(weights)
    except ConfigError as error:
        raise ConfigError(f"{key}: {weights} {error}") from None
    except Exception as error:
        raise ConfigError(f"{key}: cannot read {weights}: {one_line(error)}") from error
    for name, tensor in model.backbone.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{key}: {weights} holds NaN or infinity in backbone.{name}")
    logger.info("Teacher's weights: %s", weights)
    return checkpointer.absent
