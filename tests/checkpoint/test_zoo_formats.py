"""Checkpoints in each format of the model zoo, as teachers and as the weights of students.

Every file is written here from a detector whose tensors are known.
"""

import functools
import pickle
from pathlib import Path

import pytest
import torch
from conftest import image_batch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from ssimkd import ConfigError
from ssimkd.teacher.frozen import Teacher
from ssimkd.teacher.preprocessing import preprocessing_of
from ssimkd.teacher.spec import TeacherSpec

CPU = torch.device("cpu")
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x"
MASK_GN = "Misc/mask_rcnn_R_50_FPN_3x_gn"
RETINA = "COCO-Detection/retinanet_R_50_FPN_1x"
NARROW = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 32,  # one group norm has 32 groups
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 32,
    "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_BOX_HEAD.CONV_DIM", 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 32,
]  # fmt: skip


def arrays(state):
    return {name: value.numpy() for name, value in state.items()}


def detectron2_file(model, folder):
    content = {"model": arrays(model.state_dict()), "__author__": "Detectron2 Model Zoo"}
    return write(folder / "model_final.pkl", content)


def training_file(model, folder):
    """What Detectron2's trainer writes, after a step of the optimizer."""
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = 0.0  # the step fills the optimizer's state and changes no weight
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scheduler = build_lr_scheduler(cfg, optimizer)
    checkpointer = DetectionCheckpointer(
        model, str(folder), optimizer=optimizer, scheduler=scheduler
    )
    checkpointer.save("model_0000009", iteration=9)
    return str(folder / "model_0000009.pth")


def bare_file(model, folder):
    """Tensors alone, without "model" around them or the versions of the modules."""
    return write(folder / "bare.pth", dict(model.state_dict()))


FORMATS = [detectron2_file, training_file, bare_file]
ZOO = [(FASTER, file) for file in FORMATS] + [(MASK_GN, bare_file), (RETINA, detectron2_file)]


def write(path, content):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return str(path)


@functools.cache
def original(config):
    """A detector whose tensors all differ."""
    torch.manual_seed(0)
    model = build_model(TeacherSpec(config, "", NARROW).load_config()).eval()
    for value in model.state_dict().values():
        if value.dim() == 1:  # Norms and biases are constant at first.
            value.uniform_(0.5, 1.5)
    return model


def student(config, weights):
    """The zoo's detector as a student with adapters, started from `weights`."""
    cfg = TeacherSpec(config, "", NARROW).load_config()
    if config == RETINA:
        cfg.MODEL.META_ARCHITECTURE = "DistillRetinaNet"
        cfg.MODEL.DISTILL.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    else:
        cfg.MODEL.META_ARCHITECTURE = "DistillRCNN"
    cfg.MODEL.DISTILL.TEACHER.CONFIG = config
    cfg.MODEL.DISTILL.TEACHER.OPTS = NARROW
    cfg.MODEL.DISTILL.ADAPTER = "conv1x1"
    torch.manual_seed(1)
    model = build_model(cfg)
    DetectionCheckpointer(model).load(weights)
    return model


def assert_holds(model, expected):
    state = model.state_dict()
    different = [k for k, v in expected.items() if not torch.equal(state[k], v)]
    assert not different


@pytest.mark.parametrize("config, file", ZOO)
def test_teachers_and_students_get_the_tensors_of_the_file(config, file, tmp_path):
    model = original(config)
    path = file(model, tmp_path)
    started = student(config, path)
    assert_holds(started, model.state_dict())
    more = started.state_dict().keys() - model.state_dict().keys()
    assert all(name.startswith("distiller.") for name in more)
    spec = TeacherSpec(config, path, NARROW)
    detector, _, _ = spec.load(CPU)
    assert detector.backbone.state_dict().keys() == model.backbone.state_dict().keys()
    assert_holds(detector.backbone, model.backbone.state_dict())
    batch = image_batch((64, 96), (80, 64))
    with torch.no_grad():
        images = model.preprocess_image(batch).tensor
        expected = model.backbone(images)
    found, _ = Teacher(spec, CPU)(batch, images, preprocessing_of(model, "BGR"))
    assert found.keys() == expected.keys()
    for level, value in expected.items():  # The teacher's batch norms are folded.
        tolerance = 1e-4 * float(value.abs().max())
        torch.testing.assert_close(found[level], value, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize(
    "file, name, damage",
    [
        (detectron2_file, "fpn_output3.bias", "renamed"),
        (training_file, "bottom_up.res3.0.conv2.norm.running_var", "renamed"),
        (bare_file, "bottom_up.res3.0.conv2.norm.running_var", "missing"),
    ],
)
def test_a_tensor_that_the_file_lacks_is_named(file, name, damage, tmp_path):
    name = f"backbone.{name}"
    path = file(original(FASTER), tmp_path)
    content = pickle.load(open(path, "rb")) if path.endswith(".pkl") else torch.load(path)
    tensors = content.get("model", content)
    value = tensors.pop(name)
    if damage == "renamed":
        tensors[f"{name}_old"] = value
    write(Path(path), content)
    with pytest.raises(ConfigError, match=f"TEACHER.WEIGHTS: .*: {name} is missing$"):
        Teacher(TeacherSpec(FASTER, path, NARROW), CPU)


def test_a_file_without_statistics_has_them_in_scale_and_bias(tmp_path):
    """FrozenBatchNorm2d takes 0 and 1 for the statistics that Caffe2's files lack."""
    state = original(FASTER).state_dict()
    weights = {name: value for name, value in state.items() if "running" not in name}
    path = write(tmp_path / "x.pkl", {"model": arrays(weights), "__author__": "me"})
    detector, _, absent = TeacherSpec(FASTER, path, NARROW).load(CPU)
    assert_holds(detector, weights)
    found = {name: v for name, v in detector.state_dict().items() if "running" in name}
    assert found and not absent
    assert all((v - float(name.endswith("var"))).abs().max() < 1e-4 for name, v in found.items())


@pytest.mark.parametrize("config", [FASTER, RETINA])
def test_a_student_starts_from_a_classifier_and_a_teacher_does_not(config, tmp_path):
    """The file is like ImageNetPretrained/torchvision/R-50.pkl."""
    weights = original(config).backbone.bottom_up.state_dict()
    content = {"model": arrays(weights), "__author__": "torchvision", "matching_heuristics": True}
    path = write(tmp_path / "R-50.pkl", content)
    found = student(config, path)
    assert_holds(found.backbone.bottom_up, weights)
    untouched = student(config, "").state_dict()  # with the same seed
    rest = {k: v for k, v in untouched.items() if not k.startswith("backbone.bottom_up.")}
    assert_holds(found, rest)
    with pytest.raises(ConfigError, match=r"backbone.fpn_lateral\d.* is missing"):
        Teacher(TeacherSpec(config, path, NARROW), CPU)
