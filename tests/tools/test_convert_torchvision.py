"""torchvision's backbones in Detectron2: the same features, by the config that the help names."""

import importlib.util
import re
import sys
import textwrap

import pytest
import torch
import yaml
from conftest import ROOT
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from ssimkd.teacher.spec import TeacherSpec
from torchvision import models
from torchvision.transforms.functional import normalize

spec = importlib.util.spec_from_file_location(
    "convert_torchvision", ROOT / "tools/convert_torchvision.py"
)
convert = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert)

DEPTHS = {"resnet18": (18, 64), "resnet50": (50, 256)}  # and channels of res2


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    def refuse(*args, **kwargs):
        raise OSError("no network\nin tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file", refuse)
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        yield


def classifier(name):
    """A network of torchvision whose batch norms have learnt something."""
    torch.manual_seed(0)
    model = getattr(models, name)().eval()
    for key, value in model.state_dict().items():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5) if key.endswith(("weight", "var")) else value.normal_()
    return model


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["convert_torchvision.py", *map(str, args)])
    convert.main()


@pytest.fixture(scope="module", params=list(DEPTHS))
def converted(request, tmp_path_factory):
    """A classifier, its architecture and its converted file."""
    folder = tmp_path_factory.mktemp("converted")
    model = classifier(request.param)
    torch.save(model.state_dict(), folder / "in.pth")
    with pytest.MonkeyPatch.context() as patch:
        args = ("--weights", folder / "in.pth", "--out", folder / "new/R.pth")
        run(patch, request.param, *args)
    return model, request.param, str(folder / "new/R.pth")


class Keeper(DetectionCheckpointer):
    """Keeps what Detectron2 would only warn about."""

    def _log_incompatible_keys(self, incompatible):
        self.incompatible = incompatible


def test_features_are_torchvisions(converted):
    model, name, path = converted
    cfg = TeacherSpec("COCO-Detection/faster_rcnn_R_50_FPN_1x").load_config()
    block = re.search(r"^    MODEL:.*?FORMAT[^\n]*", convert.__doc__, re.DOTALL | re.MULTILINE)
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(textwrap.dedent(block.group()))))
    depth, channels = DEPTHS[name]
    cfg.merge_from_list([
        "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8,
        "MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", channels,
        "MODEL.RESNETS.NORM", "FrozenBN",
    ])  # fmt: skip
    detector = build_model(cfg).eval()
    checkpointer = Keeper(detector)
    checkpointer.load(path)
    missing, left_over, misshaped = checkpointer.incompatible
    assert not left_over and not misshaped
    lacks = {key for key in missing if key.startswith("backbone.bottom_up.")}
    # today's Detectron2 keeps the counters of batch norms that it freezes, without reading them
    assert not {key for key in lacks if not key.endswith("num_batches_tracked")}

    assert cfg.INPUT.FORMAT == "RGB"
    image = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(0))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of the images in [0, 1]
    x = normalize(image / 255, mean, std)[None]
    torch.testing.assert_close(detector.preprocess_image([{"image": image}]).tensor, x)
    with torch.no_grad():
        found = detector.backbone.bottom_up(x)
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for stage in (2, 3, 4, 5):
            x = getattr(model, f"layer{stage - 1}")(x)
            torch.testing.assert_close(found[f"res{stage}"], x)


def test_torchvisions_own_weights(tmp_path, monkeypatch):
    """Nothing is downloaded: the file is put where a download would have put it."""
    state = classifier("resnet18").state_dict()
    url = models.ResNet18_Weights.IMAGENET1K_V1.url
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / url.split("/")[-1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    run(monkeypatch, "resnet18", "--out", tmp_path / "R-18.pth")
    found = torch.load(tmp_path / "R-18.pth")["model"]
    assert torch.equal(found["res5.0.shortcut.norm.bias"], state["layer4.0.downsample.1.bias"])


def test_what_it_refuses(tmp_path, monkeypatch):
    out = tmp_path / "out.pth"
    torch.save(models.resnet34().state_dict(), tmp_path / "in.pth")
    for args, message in (
        (
            ["--weights", tmp_path / "in.pth", "--out", out],
            "--weights: .*in.pth does not hold a resnet18",
        ),
        (["--out", out], "--weights: cannot download resnet18.*network$"),
        (["--weights", "no.pth", "--out", out], "no.pth cannot be loaded: .*found!$"),
        (["--out", tmp_path / "out.pkl"], "--out: .*out.pkl must end in .pth"),
    ):
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            run(monkeypatch, "resnet18", *args)
    assert not out.exists()
