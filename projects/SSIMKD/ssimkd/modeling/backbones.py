"""Classification networks of torchvision and timm as Detectron2 backbones, for small students.

`backbone_features.py` finds their features, so that no network is listed here. A new kind of
backbone is one class like TorchvisionBackbone, and one function like
:func:`build_torchvision_fpn_backbone`.
"""

import logging
import os
from importlib import import_module
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from ssimkd.checkpoint.reader import read_weights
from ssimkd.checkpoint.torchvision_weights import load_torchvision_weights
from ssimkd.errors import ConfigError, as_config_error, one_line, shortened

from .backbone_features import (
    COARSEST,
    STRIDES,
    check_shapes,
    find_features,
    train_only,
    used_parameters,
)

logger = logging.getLogger(__name__)
NORMS = ("FrozenBN", "BN", "SyncBN")


class TorchvisionBackbone(Backbone):
    """A classification network of torchvision without its classifier.

    The parameters keep torchvision's names, below `body.`.

    Args:
        name (str): in `torchvision.models`, such as "mobilenet_v2" or "resnet18".
        weights (str): "DEFAULT" for the library's own ImageNet weights, which are downloaded; a
            file or URL with a state dict of the network; "" for random weights.
        norm (str): of the batch norms. "FrozenBN": statistics, scale and shift stay as they are.
            "BN": they are trained. "SyncBN": they are trained, with statistics of all processes.
        freeze_at (int): 0: all parameters are trained; 2 to 5: those that the features up to res2,
            res3, res4 or res5 need stay as they are.
        out_features (sequence[str]): of STRIDES.

    Attributes:
        pixels (sequence[float], sequence[float]): mean and standard deviation of R, G and B, in
            [0, 1], of the images that the weights were trained on; None with random weights.

    Raises:
        ConfigError: there is no such network, its features do not have these strides, or the
            weights cannot be loaded.
    """

    key = "MODEL.TORCHVISION"
    pixels: Optional[Tuple[Sequence[float], Sequence[float]]] = None

    def __init__(
        self,
        name: str,
        *,
        weights: str = "",
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        out_features: Sequence[str] = tuple(STRIDES),
    ) -> None:
        super().__init__()
        self.name, self.weights = name, os.fspath(weights)
        weights = self.weights
        if norm not in NORMS:
            raise ConfigError(f"{self.key}.NORM: {norm!r} is none of {', '.join(NORMS)}")
        if not out_features or not set(out_features) <= set(STRIDES):
            raise ConfigError(
                "MODEL.FPN.IN_FEATURES (.yaml) or out_features (.py) must be some of "
                f"{', '.join(STRIDES)}"
            )
        if weights not in ("", "DEFAULT") and "://" not in weights and not os.path.isfile(weights):
            raise ConfigError(f"{self.key}.WEIGHTS: there is no file {weights}")
        self._out_features = [feature for feature in STRIDES if feature in out_features]
        self._out_feature_strides = {feature: STRIDES[feature] for feature in self._out_features}
        # up to the coarsest that is asked for: later layers would never get a gradient
        self.features = list(STRIDES)[: list(STRIDES).index(self._out_features[-1]) + 1]
        if freeze_at and f"res{freeze_at}" not in self.features:
            raise ConfigError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: it must be 0, or the number of one of "
                f"{', '.join(self.features)}"
            )
        try:
            self.body, self._out_feature_channels = self.build(name, weights)
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{self.key}.NAME: {name}: {one_line(error)}") from error
        train_only(self.body, used_parameters(self.body, self._out_features))
        if freeze_at:
            self.freeze(f"res{freeze_at}")
        if norm == "FrozenBN":
            self.body = self.freeze_norms(self.body)
        elif norm == "SyncBN":
            self.body = self.synchronize_norms(self.body)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Gives a deep copy its original's mode: torchvision puts copies into training mode."""
        super().__setstate__(state)
        self.body.train(self.training)

    def build(self, name: str, weights: str) -> Tuple[nn.Module, Dict[str, int]]:
        """The network, which returns a dict of `features`, and their channels.

        Raises:
            ValueError: the network does not have these features.
        """
        if name not in torchvision.models.list_models(module=torchvision.models):
            raise ConfigError(f"{self.key}.NAME: torchvision has no network {name!r}")
        network = torchvision.models.get_model(name, weights=None)
        if hasattr(network, "transform_input"):  # GoogLeNet's, which torchvision sets with weights
            network.transform_input = True
        if weights:
            load_torchvision_weights(network, name, weights)
            images = torchvision.models.get_model_weights(name).DEFAULT.transforms()
            self.pixels = images.mean, images.std
        modules, channels = find_features(network)
        wanted = {modules[feature]: feature for feature in self.features}
        return create_feature_extractor(network, wanted), channels

    def forward(self, images: Tensor) -> Dict[str, Tensor]:
        """Feature -> (N, C, H / stride, W / stride), for images (N, 3, H, W)."""
        maps = self.body(images)
        return {feature: maps[feature] for feature in self._out_features}

    def freeze(self, last: str) -> None:
        """Stops the training of all parameters that the features up to `last` depend on.

        Their batch norms are frozen, as in Detectron2's ResNet.
        """
        features = self.features[: self.features.index(last) + 1]
        for name, parameter in used_parameters(self.body, features).items():
            parameter.requires_grad_(False)
            path, _, _ = name.rpartition(".")
            module = self.body.get_submodule(path)
            if isinstance(module, nn.BatchNorm2d):
                parent, _, child = path.rpartition(".")
                setattr(self.body.get_submodule(parent), child, self.freeze_norms(module))

    def freeze_norms(self, module: nn.Module) -> nn.Module:
        """A module with its batch norms, and those below it, frozen."""
        return FrozenBatchNorm2d.convert_frozen_batchnorm(module)

    def synchronize_norms(self, module: nn.Module) -> nn.Module:
        """A module whose batch norms, and those below it, take the statistics of all processes."""
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of it, since some networks round odd sizes down."""
        return COARSEST


class TimmBackbone(TorchvisionBackbone):
    """A network of timm, where timm is installed; see :class:`TorchvisionBackbone`.

    Args:
        name (str): as in `timm.create_model`, which gets `features_only=True`.
        weights (str): "DEFAULT": timm's own; a file of timm's; "": random.
    """

    key = "MODEL.TIMM"

    def build(self, name: str, weights: str) -> Tuple[nn.Module, Dict[str, int]]:
        """See :meth:`TorchvisionBackbone.build`."""
        try:
            import timm
        except ImportError as error:
            raise ConfigError(f"{self.key} needs pip install timm ({one_line(error)})") from error
        if not timm.is_model(name):
            raise ConfigError(f"{self.key}.NAME: timm has no network {name!r}")
        network: Any = timm.create_model(name, features_only=True)
        reductions = network.feature_info.reduction()
        missing = [STRIDES[f] for f in self.features if STRIDES[f] not in reductions]
        if missing:
            raise ValueError(f"it has no feature of stride {missing[0]}")
        numbers = network.feature_info.out_indices
        places = [numbers[reductions.index(STRIDES[feature])] for feature in self.features]
        options: Dict[str, Any] = dict(pretrained=bool(weights))
        if weights not in ("", "DEFAULT"):
            with as_config_error(f"{self.key}.WEIGHTS"):
                options["pretrained_cfg_overlay"] = {"state_dict": read_weights(weights)}
        try:
            if "pretrained_cfg_overlay" in options:
                timm.create_model(name, **options)  # strict, which features_only is not
            network = timm.create_model(name, features_only=True, out_indices=places, **options)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"{self.key}.WEIGHTS: {weights} cannot be fetched or does not fit {name}; a file "
                f"can be named here: {shortened(error)}"
            ) from error
        network.pretrained_cfg.pop("state_dict", None)  # it would be kept in memory
        if weights:
            self.pixels = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
        body = TimmFeatures(network, self.features)
        check_shapes(body)
        return body, dict(zip(self.features, network.feature_info.channels()))

    def freeze_norms(self, module: nn.Module) -> nn.Module:
        """See :class:`TorchvisionBackbone`. Some batch norms of timm contain an activation."""
        return import_module("timm.layers").freeze_batch_norm_2d(module)

    def synchronize_norms(self, module: nn.Module) -> nn.Module:
        """See :meth:`freeze_norms`."""
        return import_module("timm.layers").convert_sync_batchnorm(module)


class TimmFeatures(nn.Module):
    """Names the maps of the list that a timm network returns.

    Args:
        network (nn.Module): of timm, with `features_only`.
        features (sequence[str]): of STRIDES, as many as it returns maps.
    """

    def __init__(self, network: nn.Module, features: Sequence[str]) -> None:
        super().__init__()
        self.network, self.features = network, list(features)

    def forward(self, images: Tensor) -> Dict[str, Tensor]:
        """Feature -> map."""
        return dict(zip(self.features, self.network(images)))


def check_pixels(detector: Any) -> None:
    """Checks that a backbone with weights of its library gets such images as these were trained on.

    Raises:
        ConfigError: another channel order, mean or standard deviation. For a file, whose weights
            may have been trained otherwise, this is only a warning.
    """
    for backbone in detector.modules():
        if not (isinstance(backbone, TorchvisionBackbone) and backbone.pixels):
            continue
        mean, std = ([round(255 * x, 3) for x in values] for values in backbone.pixels)
        if not hasattr(detector, "pixel_mean"):
            continue  # it prepares images by code of its own
        order = getattr(detector, "input_format", None) or getattr(detector, "image_format", "RGB")
        given = torch.cat([detector.pixel_mean.flatten(), detector.pixel_std.flatten()]).cpu()
        if order == "RGB" and torch.allclose(given, torch.tensor([*mean, *std]), rtol=1e-3):
            continue
        text = (
            f"the weights of {backbone.name} were trained on other images than those of this "
            f"config: set INPUT.FORMAT (.yaml) or input_format and image_format (.py) to RGB, "
            f"MODEL.PIXEL_MEAN or model.pixel_mean to {mean}, and MODEL.PIXEL_STD or "
            f"model.pixel_std to {std}"
        )
        if backbone.weights == "DEFAULT":
            raise ConfigError(text)
        logger.warning("%s: if they are the library's, %s", backbone.weights, text)


def build_fpn(cfg, bottom_up: TorchvisionBackbone, dense: bool) -> FPN:
    """Detectron2's FPN on a backbone, by the keys of `cfg.MODEL.FPN`.

    Args:
        cfg (CfgNode): the config.
        bottom_up (TorchvisionBackbone): of which FPN.IN_FEATURES are used.
        dense (bool): add p6 and p7 by convolutions of res5, as RetinaNet does; otherwise p6 is
            subsampled from p5, as in Faster R-CNN.
    """
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top: nn.Module = LastLevelMaxPool()
    if dense:
        top = LastLevelP6P7(bottom_up.output_shape()["res5"].channels, channels)
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def options_of(cfg, node) -> Dict[str, Any]:
    """Arguments of a backbone from its config node, `cfg.MODEL.TORCHVISION` or `.TIMM`.

    The library's weights are not fetched where a checkpoint, MODEL.WEIGHTS, replaces them.
    """
    return dict(
        name=node.NAME,
        weights="" if cfg.MODEL.WEIGHTS else node.WEIGHTS,
        norm=node.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        out_features=cfg.MODEL.FPN.IN_FEATURES,
    )


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """p2 to p6 of a network of torchvision, `cfg.MODEL.TORCHVISION`."""
    return build_fpn(cfg, TorchvisionBackbone(**options_of(cfg, cfg.MODEL.TORCHVISION)), False)


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """p3 to p7 of a network of torchvision, `cfg.MODEL.TORCHVISION`."""
    return build_fpn(cfg, TorchvisionBackbone(**options_of(cfg, cfg.MODEL.TORCHVISION)), True)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """p2 to p6 of a network of timm, `cfg.MODEL.TIMM`."""
    return build_fpn(cfg, TimmBackbone(**options_of(cfg, cfg.MODEL.TIMM)), False)


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """p3 to p7 of a network of timm, `cfg.MODEL.TIMM`."""
    return build_fpn(cfg, TimmBackbone(**options_of(cfg, cfg.MODEL.TIMM)), True)
