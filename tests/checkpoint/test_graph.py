"""Students as TorchScript and ONNX: what the files compute, and what is not written."""

import subprocess
import sys
from contextlib import nullcontext

import cv2
import numpy as np
import pytest
import torch
from conftest import save_teacher, shapes_cfg, zoo_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from ssimkd import ConfigError
from ssimkd.checkpoint import graph
from ssimkd.checkpoint.graph import write_graph
from ssimkd.commands import export as export_student

try:
    import detectron2.export as exporting
except ImportError:
    exporting = None  # v0.5
NEEDS_EXPORT = pytest.mark.skipif(exporting is None, reason="Detectron2 v0.5")
BACKBONE = ("MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone", "MODEL.WEIGHTS", "")
NETWORK = ("MODEL.TORCHVISION.NAME", "mobilenet_v2", "MODEL.TORCHVISION.WEIGHTS", "")
DETECTORS = {  # name -> config of the Shapes data, and overrides
    "teacher": ("teacher", ()),
    "mobilenet_v2": ("vanilla", (*BACKBONE, *NETWORK)),  # with random weights
}


@pytest.fixture(scope="module")
def files(few_shapes):
    """Landscape, portrait and square images."""
    return [f"{few_shapes}/ssimkd_shapes/val/{number:06d}.jpg" for number in range(8)]


@pytest.fixture(scope="module")
def images(files):
    return [torch.as_tensor(cv2.imread(path).transpose(2, 0, 1)) for path in files]


# Programs that read a graph where neither Detectron2 nor this package can be imported.
READ = {
    "torchscript": """
import sys
sys.modules.update(detectron2=None, ssimkd=None)
import numpy, torch, torchvision
graph = torch.jit.load(sys.argv[1])
found = graph(torch.as_tensor(numpy.load(sys.argv[2])))
boxes, scores, classes = (tensor.numpy() for tensor in found)
""",
    "onnx": """
import sys
sys.modules.update(detectron2=None, ssimkd=None)
import numpy, onnxruntime
graph = onnxruntime.InferenceSession(sys.argv[1])
names = ["pred_boxes", "scores", "pred_classes"]
boxes, scores, classes = graph.run(names, {"image": numpy.load(sys.argv[2])})
""",
}
WRITE = """
numpy.savez(sys.argv[3], boxes=boxes, scores=scores, classes=classes)
"""


@NEEDS_EXPORT
@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("name", DETECTORS)
def test_a_graph_finds_what_detectron2_finds(name, kind, files, images, tmp_path, capsys):
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is an optional package")
    shapes = {tuple(image.shape) for image in images}
    assert len(shapes) > 1  # The graph is traced on one size.
    config, opts = DETECTORS[name]
    weights = "configs/shapes/teacher.pth"
    if opts:
        weights = save_teacher(shapes_cfg(config, *opts), tmp_path / "weights.pth")
    words = ["--config-file", f"configs/shapes/{config}.yaml", "--weights", weights]
    words += ["--format", kind, "--images", *files, "--out", str(tmp_path)]
    export_student.main([*words, *opts])
    path = tmp_path / f"student{graph.SUFFIXES[kind]}"
    assert capsys.readouterr().out.endswith(f"{path}: agrees with the detector on 8 images\n")
    predictor = DefaultPredictor(shapes_cfg(config, *opts, "MODEL.WEIGHTS", weights))
    other = next(i for i, image in enumerate(images) if image.shape != images[0].shape)
    np.save(tmp_path / "image.npy", images[other].numpy())
    command = [sys.executable, "-c", READ[kind] + WRITE, str(path)]
    subprocess.run([*command, str(tmp_path / "image.npy"), str(tmp_path / "out.npz")], check=True)
    found = np.load(tmp_path / "out.npz")
    expected = predictor(cv2.imread(files[other]))["instances"]
    assert len(expected) > 0
    tensors = (expected.pred_boxes.tensor, expected.scores, expected.pred_classes)
    for name, tensor in zip(("boxes", "scores", "classes"), tensors):
        np.testing.assert_allclose(found[name], tensor.numpy(), rtol=1e-4, atol=1e-3)


@NEEDS_EXPORT
def test_the_number_of_proposals_can_vary(images, tmp_path, monkeypatch):
    torch.manual_seed(0)  # With random weights the number of proposals differs between images.
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    maskrcnn = build_model(zoo_cfg(name, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)).eval()
    path = write_graph(maskrcnn, images[:3], "torchscript", str(tmp_path))
    assert torch.jit.load(path)(images[0])[3].shape[1:] == (1, 28, 28)
    kept = (tmp_path / "student.ts").read_bytes()
    # Without Detectron2's patch of `len` the first image's number of proposals is a constant.
    monkeypatch.setattr(exporting.flatten, "patch_builtin_len", nullcontext)
    with pytest.raises(ConfigError, match="nothing is written, .* does not agree .* on image"):
        write_graph(maskrcnn, images[:3], "torchscript", str(tmp_path))
    assert (tmp_path / "student.ts").read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["student.ts"]


@NEEDS_EXPORT
def test_what_cannot_be_exported_is_one_line(images, tmp_path, monkeypatch):
    panoptic = build_model(zoo_cfg("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml")).eval()
    with pytest.raises(ConfigError, match="a PanopticFPN gives more than instances"):
        write_graph(panoptic, images[:2], "torchscript", str(tmp_path))
    blind = build_model(shapes_cfg("teacher", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.99)).eval()
    with pytest.raises(ConfigError, match="finds nothing in them"):
        write_graph(blind, images[:2], "torchscript", str(tmp_path))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    model = build_model(shapes_cfg("teacher")).eval()
    with pytest.raises(ConfigError, match="--format onnx needs pip install onnxruntime"):
        write_graph(model, images[:2], "onnx", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(exporting is not None, reason="it can be exported")
def test_detectron2_v0_5_says_what_it_needs(images, tmp_path):
    model = build_model(shapes_cfg("teacher")).eval()
    with pytest.raises(ConfigError, match="--format onnx needs Detectron2 v0.6 or later"):
        write_graph(model, images[:2], "onnx", str(tmp_path))
