"""Networks of torchvision and timm as backbones: their features, weights, norms, and a step."""

import re
import subprocess
import sys
from copy import deepcopy

import cv2
import pytest
import torch
import torchvision
from conftest import image_batch, save_teacher, shapes_cfg
from detectron2.engine import DefaultPredictor
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError
from ssimkd.checkpoint.export import plain_config, to_yaml
from ssimkd.engine import yaml_driver
from ssimkd.engine.arguments import load_config
from ssimkd.engine.lazy_driver import build_model as build_lazy_model
from ssimkd.modeling.backbone_features import STRIDES
from ssimkd.modeling.backbones import TimmBackbone, TorchvisionBackbone
from ssimkd.modeling.several_teachers import build_teachers
from ssimkd.report.run import Run
from torch import nn

NETWORKS = {  # -> channels of res2 to res5, by the papers and torchvision's sources
    "convnext_tiny": (96, 192, 384, 768),
    "densenet121": (256, 512, 1024, 1024),
    "efficientnet_b0": (24, 40, 112, 1280),
    "efficientnet_v2_s": (48, 64, 160, 1280),
    "googlenet": (192, 480, 832, 1024),
    "mnasnet0_5": (16, 24, 48, 1280),
    "mobilenet_v2": (24, 32, 96, 1280),
    "mobilenet_v3_large": (24, 40, 112, 960),
    "mobilenet_v3_small": (16, 24, 48, 576),
    "regnet_x_400mf": (32, 64, 160, 400),
    "regnet_y_400mf": (48, 104, 208, 440),
    "resnet18": (64, 128, 256, 512),
    "resnet34": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "shufflenet_v2_x1_0": (24, 116, 232, 1024),
}
MODULES = {  # -> prefix and endings of torchvision's modules that give res2 to res5
    "convnext_tiny": ("features.", 1, 3, 5, 7),
    "densenet121": ("features.", "denseblock1", "denseblock2", "denseblock3", "norm5"),
    "efficientnet_b0": ("features.", 2, 3, 5, 8),
    "efficientnet_v2_s": ("features.", 2, 3, 5, 7),
    "googlenet": ("", "conv3", "inception3b", "inception4e", "inception5b"),
    "mnasnet0_5": ("layers.", 8, 9, 11, 16),
    "mobilenet_v2": ("features.", 3, 6, 13, 18),
    "mobilenet_v3_large": ("features.", 3, 6, 12, 16),
    "mobilenet_v3_small": ("features.", 1, 3, 8, 12),
    "regnet_x_400mf": ("trunk_output.block", 1, 2, 3, 4),
    "regnet_y_400mf": ("trunk_output.block", 1, 2, 3, 4),
    "resnet18": ("layer", 1, 2, 3, 4),
    "resnet34": ("layer", 1, 2, 3, 4),
    "resnet50": ("layer", 1, 2, 3, 4),
    "shufflenet_v2_x1_0": ("", "maxpool", "stage2", "stage3", "conv5"),
}
SMALL = ("MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone", "MODEL.WEIGHTS", "")
RESNET18 = ("MODEL.TORCHVISION.NAME", "resnet18", "MODEL.TORCHVISION.WEIGHTS", "")


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_strides_and_channels_are_those_of_the_maps(name):
    backbone = TorchvisionBackbone(name).eval()
    shapes = backbone.output_shape()
    assert tuple(shape.channels for shape in shapes.values()) == NETWORKS[name]
    for size, padded in (((224, 320), (224, 320)), ((71, 33), (96, 64))):
        # as a detector pads them
        images = ImageList.from_tensors([torch.rand(3, *size)], backbone.size_divisibility).tensor
        assert tuple(images.shape[-2:]) == padded
        for feature, maps in backbone(images).items():
            stride = STRIDES[feature]
            assert shapes[feature].stride == stride
            assert maps.shape == (1, shapes[feature].channels, *(n // stride for n in padded))


@torch.no_grad()
def test_resnet18_gives_the_maps_of_torchvisions_own():
    own = torchvision.models.resnet18(weights=None).eval()
    backbone = TorchvisionBackbone("resnet18", norm="BN").eval()
    backbone.body.load_state_dict({k: v for k, v in own.state_dict().items() if "fc." not in k})
    images = torch.rand(2, 3, 64, 96)
    expected = own.maxpool(own.relu(own.bn1(own.conv1(images))))
    maps = backbone(images)
    for feature, layer in zip(STRIDES, (own.layer1, own.layer2, own.layer3, own.layer4)):
        expected = layer(expected)
        assert torch.equal(maps[feature], expected)


def published_weights(name):
    """A random state dict of a network as torchvision publishes it: by the names of older versions.

    Nothing in it is constant, so that every tensor matters.
    """
    state = torchvision.models.get_model(name, weights=None).state_dict()
    state._metadata = {"": state._metadata[""]}  # norms did not count batches
    for key in list(state):
        value = state.pop(key)
        if key.endswith("num_batches_tracked"):
            continue
        if (value == value.flatten()[0]).all():
            value.uniform_(0.5, 1.5)
        state[re.sub(r"(denselayer\d+\.\w+)([12]\.)", r"\1.\2", key)] = value
    return state


def test_old_names_in_a_file_do_not_hide_the_key_of_an_error(tmp_path):
    torch.save(published_weights("densenet121"), tmp_path / "own.pth")
    with pytest.raises(ConfigError, match="MODEL.TORCHVISION.WEIGHTS: .* does not fit densenet169"):
        TorchvisionBackbone("densenet169", weights=tmp_path / "own.pth")


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_file_of_the_library_gives_the_maps_of_torchvisions_own(name, monkeypatch, tmp_path):
    path, expected = str(tmp_path / "own.pth"), {}
    torch.save(published_weights(name), path)
    fetch = "load_state_dict_from_url"
    monkeypatch.setattr(torchvision.models._api, fetch, lambda *args, **kwargs: torch.load(path))
    own = torchvision.models.get_model(name, weights="DEFAULT").eval()
    prefix, *endings = MODULES[name]
    for feature, ending in zip(STRIDES, endings):

        def keep(module, inputs, output, feature=feature):
            expected[feature] = output.clone()  # later modules may change it in place

        own.get_submodule(f"{prefix}{ending}").register_forward_hook(keep)
    images = torch.rand(2, 3, 64, 96)
    own(images)
    torch.testing.assert_close(TorchvisionBackbone(name, weights=path).eval()(images), expected)


def test_a_file_of_the_library_is_loaded_completely(tmp_path):
    own, path = torchvision.models.mobilenet_v3_small(weights=None), tmp_path / "own.pth"
    torch.save(own.state_dict(), path)
    state = TorchvisionBackbone("mobilenet_v3_small", weights=path).body.state_dict()
    assert state and all(torch.equal(value, own.state_dict()[key]) for key, value in state.items())
    with pytest.raises(
        ConfigError, match=r"MODEL.TORCHVISION.WEIGHTS: .*own.pth does not fit resn"
    ):
        TorchvisionBackbone("resnet18", weights=path)
    with pytest.raises(ConfigError, match="WEIGHTS: there is no file .*none.pth"):
        TorchvisionBackbone("resnet18", weights=str(tmp_path / "none.pth"))


def test_without_a_network_the_error_says_where_the_file_goes(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=rf"cannot fetch https://.*put the file at {tmp_path}"):
        TorchvisionBackbone("resnet18", weights="DEFAULT")
    url = torchvision.models.get_model_weights("resnet18").DEFAULT.url
    cut = tmp_path / "checkpoints" / url.rpartition("/")[2]
    cut.parent.mkdir()
    cut.write_bytes(b"half a download")
    with pytest.raises(ConfigError, match=f"its name says: .*; delete {cut} to fetch it again"):
        TorchvisionBackbone("resnet18", weights="DEFAULT")


@pytest.mark.parametrize("training", [True, False])
def test_a_deep_copy_is_in_the_mode_of_its_original(training):
    """Stochastic depth drops blocks in training."""
    model = TorchvisionBackbone("efficientnet_b0").train(training)
    copy = deepcopy(model)
    assert all(m.training == training for m in copy.modules())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(images)["res5"]
        torch.manual_seed(0)
        assert torch.equal(copy(images)["res5"], expected)


def test_norms_and_frozen_stages():
    frozen = TorchvisionBackbone("mobilenet_v3_small", freeze_at=3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    trained = TorchvisionBackbone("mobilenet_v3_small", norm="BN", freeze_at=3)
    still = {name for name, p in trained.named_parameters() if not p.requires_grad}
    # features.0 to features.3 lead to res3, and features.4 halves the resolution
    assert {name.split(".")[2] for name in still} == {"0", "1", "2", "3"}
    moving = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in moving}.isdisjoint({"0", "1", "2", "3"})
    kinds = {type(m) for name, m in trained.named_modules() if name.startswith("body.features.2.")}
    assert FrozenBatchNorm2d in kinds and nn.BatchNorm2d not in kinds
    synced = TorchvisionBackbone("mobilenet_v3_small", norm="SyncBN")
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(name="no_such"), "torchvision has no network 'no_such'"),
        (dict(name="squeezenet1_1"), "no feature of stride 4"),
        (dict(name="vit_b_16"), "vit_b_16"),
        (dict(name="resnet18", norm="LN"), "MODEL.TORCHVISION.NORM"),
        (dict(name="resnet18", freeze_at=1), "MODEL.BACKBONE.FREEZE_AT"),
    ],
)
def test_what_cannot_be_built_is_one_line_that_names_the_key(options, words):
    with pytest.raises(ConfigError, match=words):
        TorchvisionBackbone(**options)


MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of torchvision's images
YAML_PIXELS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
LAZY_PIXELS = ("model.input_format", "model.pixel_mean", "model.pixel_std")


def yaml_model(values, weights):
    name = ("MODEL.TORCHVISION.NAME", "resnet18", "MODEL.TORCHVISION.WEIGHTS", weights)
    opts = [x for pair in zip(YAML_PIXELS, values) for x in pair]
    return build_model(shapes_cfg("vanilla", *SMALL, *name, *opts))


def lazy_model(values, weights):
    opts = [f"{key}={value}".replace(" ", "") for key, value in zip(LAZY_PIXELS, values)]
    opts += [f"model.backbone.bottom_up.weights={weights}", "train.device=cpu"]
    opts += ["model.distiller=null"]
    return build_lazy_model(load_config("configs/ssimkd_resnet18.py", opts))


@pytest.mark.parametrize("build", [yaml_model, lazy_model])
def test_weights_of_the_library_need_images_as_in_their_training(
    build, monkeypatch, tmp_path, caplog
):
    own, fetch = torchvision.models.resnet18(weights=None).state_dict(), "load_state_dict_from_url"
    monkeypatch.setattr(torchvision.models._api, fetch, lambda *args, **kwargs: own)
    model = build(("RGB", MEAN, STD), "DEFAULT")
    build_teachers(model)
    text = r"the weights of resnet18 .* model.pixel_mean to \[123.675, 116.28, 103.53\]"
    for name, value in (("input_format", "BGR"), ("pixel_mean", STD), ("pixel_std", MEAN)):
        right, wrong = getattr(model, name), value if value == "BGR" else torch.tensor(value)
        setattr(model, name, wrong)
        with pytest.raises(ConfigError, match=text):
            build_teachers(model)
        setattr(model, name, right)
    torch.save(own, tmp_path / "own.pth")
    assert not caplog.records
    build_teachers(build(("BGR", MEAN, STD), str(tmp_path / "own.pth")))  # perhaps trained in BGR
    assert f"own.pth: if they are the library's, {text[:23]}" in caplog.text


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv2_050", "mobilenetv3_small_050", "regnetx_002"]
)
def test_a_network_of_timm_gives_its_own_maps(name, norm):
    timm = pytest.importorskip("timm", reason="timm is an optional package")
    own = timm.create_model(name, features_only=True).eval()
    for module in own.modules():
        if isinstance(module, nn.BatchNorm2d):  # some contain an activation
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    freeze_at = 3 if norm == "BN" else 0
    backbone = TimmBackbone(name, norm=norm, freeze_at=freeze_at, out_features=("res3", "res4"))
    state = {
        key: x for key, x in own.state_dict().items() if key in backbone.body.network.state_dict()
    }
    backbone.body.network.load_state_dict(state)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        maps, expected = backbone.eval()(images), own(images)[2:4]
    assert list(maps) == ["res3", "res4"]
    for feature, mine, theirs in zip(maps, maps.values(), expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert backbone.output_shape()[feature].channels == mine.shape[1]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "dla34"])
def test_every_trained_parameter_of_a_timm_network_gets_a_gradient(name):
    pytest.importorskip("timm", reason="timm is an optional package")
    backbone = TimmBackbone(name, norm="BN", out_features=("res2", "res3"))
    maps = backbone(torch.rand(2, 3, 64, 96))
    assert [x.shape[2:] for x in maps.values()] == [(16, 24), (8, 12)]
    sum(x.sum() for x in maps.values()).backward()
    assert {p.requires_grad for p in backbone.parameters() if p.grad is None} <= {False}


@pytest.mark.parametrize("features", [("res2", "res3", "res4", "res5"), ("res3", "res4", "res5")])
def test_every_parameter_that_a_feature_depends_on_is_trained(features):
    """Each feature of an HRNet has a branch of its own, up to the end."""
    pytest.importorskip("timm", reason="timm is an optional package")
    backbone = TimmBackbone("hrnet_w18_small", norm="BN", out_features=features)
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    backbone.requires_grad_(True)
    sum(x.sum() for x in backbone(torch.rand(2, 3, 64, 96)).values()).backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize(
    "name, text",
    [
        ("inception_v3", "its map of stride 4|Kernel size|input size"),
        ("vit_tiny_patch16_224", "feature of stride 4|not support"),
        ("resnet19", "timm has no network 'resnet19'"),
    ],
)
def test_a_timm_network_that_cannot_take_images_of_any_size_is_refused(name, text):
    pytest.importorskip("timm", reason="timm is an optional package")
    with pytest.raises(ConfigError, match=f"MODEL.TIMM.NAME: .*({text})"):
        TimmBackbone(name)


def test_weights_of_timm(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is an optional package")
    path, whole = str(tmp_path / "own.pth"), timm.create_model("resnet18", pretrained=False)
    torch.save(whole.state_dict(), path)
    loaded = TimmBackbone("resnet18", weights=path)
    assert torch.equal(loaded.body.network.conv1.weight, whole.conv1.weight)
    assert loaded.pixels == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(ConfigError, match=r"MODEL.TIMM.WEIGHTS: .*own.pth .* not fit resnet10t"):
        TimmBackbone("resnet10t", weights=path)


def test_without_timm_the_error_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match="pip install timm"):
        TimmBackbone("resnet18")


@pytest.mark.parametrize("library_teacher", [False, True])
def test_a_student_learns_from_a_teacher_of_any_backbone(library_teacher, tmp_path, teacher_file):
    """Its channels meet the teacher's in the FPN; a network of torchvision can teach as well."""
    opts = [*SMALL, *RESNET18, "MODEL.BACKBONE.FREEZE_AT", 2]
    if library_teacher:
        teacher_file = save_teacher(shapes_cfg("vanilla", *opts), tmp_path / "teacher.pth")
        opts += ["MODEL.DISTILL.TEACHER.CONFIG", "shapes/vanilla.yaml"]
        opts += ["MODEL.DISTILL.TEACHER.OPTS", list(opts[:8])]
    cfg = shapes_cfg("ssimkd", *opts, "MODEL.DISTILL.TEACHER.WEIGHTS", teacher_file)
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(image_batch((96, 96)))
    losses["ssim_kd_loss"].backward()
    moved = {n for n, p in model.backbone.named_parameters() if p.grad is not None}
    assert any(".layer2." in n for n in moved) and not any(".layer1." in n for n in moved)


# A program that does what the head of `student.yaml` says.
READ = """
import sys, cv2, torch, ssimkd
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
cfg = get_cfg()
ssimkd.add_ssimkd_config(cfg)
cfg.merge_from_file(sys.argv[1] + "/student.yaml")
cfg.MODEL.WEIGHTS = sys.argv[1] + "/student.pth"
found = DefaultPredictor(cfg)(cv2.imread(sys.argv[2]))["instances"]
torch.save(found.get_fields(), sys.argv[1] + "/found.pth")
"""


def test_a_student_is_resumed_evaluated_and_exported_without_a_download(
    monkeypatch, tmp_path, few_names, few_shapes, teacher_file
):
    """Weights "DEFAULT" are fetched when training starts from them, and never after that."""
    own, fetched = torchvision.models.resnet18(weights=None).state_dict(), []

    def fetch(url, *args, **kwargs):
        fetched.append(url)
        return own

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    opts = [*SMALL, "MODEL.TORCHVISION.NAME", "resnet18", "OUTPUT_DIR", str(tmp_path)]
    opts += [x for pair in zip(YAML_PIXELS, ("RGB", MEAN, STD)) for x in pair]
    opts += ["DATASETS.TRAIN", few_names[:1], "DATASETS.TEST", few_names[1:], "SOLVER.STEPS", ()]
    opts += ["MODEL.DISTILL.TEACHER.WEIGHTS", teacher_file, "SOLVER.MAX_ITER", 1]
    cfg = shapes_cfg("ssimkd", *opts, "SOLVER.IMS_PER_BATCH", 2, "MODEL.DISTILL.CHECK_IMAGES", 0)
    yaml_driver.train(cfg, resume=False)
    assert len(fetched) == 1
    first = torch.load(tmp_path / "model_final.pth")["model"]
    cfg.SOLVER.MAX_ITER = 2
    yaml_driver.train(cfg, resume=True)
    last = torch.load(tmp_path / "model_final.pth")
    name = "backbone.bottom_up.body.layer4.1.conv2.weight"
    assert last["iteration"] == 1 and 0 < (last["model"][name] - first[name]).abs().max() < 0.1
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    assert "bbox" in yaml_driver.evaluate(cfg, resume=False)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    Run(str(tmp_path)).build()  # as the report does
    assert len(fetched) == 1
    text = (tmp_path / "student.yaml").read_text()
    assert text.startswith("# The backbone comes with the package ssimkd")
    assert "Import ssimkd, and call ssimkd.add_ssimkd_config(cfg) before" in text
    image = f"{few_shapes}/ssimkd_shapes/val/000000.jpg"
    subprocess.run([sys.executable, "-c", READ, str(tmp_path), image], check=True)
    found = torch.load(tmp_path / "found.pth", weights_only=False)
    expected = DefaultPredictor(cfg)(cv2.imread(image))["instances"].get_fields()
    assert len(expected["scores"]) > 0
    torch.testing.assert_close(found["scores"], expected["scores"])
    torch.testing.assert_close(found["pred_boxes"].tensor, expected["pred_boxes"].tensor)
    assert torch.equal(found["pred_classes"], expected["pred_classes"])


def test_the_student_of_a_lazy_config_says_which_package_it_needs():
    cfg = load_config("configs/ssimkd_resnet18.py", [])
    assert to_yaml(plain_config(cfg, "")).startswith("# The backbone comes with the package ssimkd")
    plain = to_yaml(plain_config(load_config("configs/ssimkd_R50.py", []), ""))
    assert "ssimkd" not in plain
