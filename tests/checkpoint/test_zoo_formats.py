"""Checkpoints in each format of the model zoo, as teachers and as the weights of students.

Every file is written here from a detector whose tensors are known. The names that Detectron1
(Caffe2) gave them are those of its own detectron/modeling: ResNet.py, FPN.py,
fast_rcnn_heads.py, mask_rcnn_heads.py and retinanet_heads.py.
"""

import functools
import pickle
import re
from pathlib import Path

import numpy as np
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

CAFFE2_MODULES = {
    "backbone.bottom_up.stem.conv1": "conv1",
    # lateral convolutions: the topmost has no sum to be the lateral of
    "backbone.fpn_lateral2": "fpn_inner_res2_2_sum_lateral",
    "backbone.fpn_lateral3": "fpn_inner_res3_3_sum_lateral",
    "backbone.fpn_lateral4": "fpn_inner_res4_5_sum_lateral",
    "backbone.fpn_lateral5": "fpn_inner_res5_2_sum",
    "backbone.fpn_output2": "fpn_res2_2_sum",
    "backbone.fpn_output3": "fpn_res3_3_sum",
    "backbone.fpn_output4": "fpn_res4_5_sum",
    "backbone.fpn_output5": "fpn_res5_2_sum",
    "backbone.top_block.p6": "fpn_6",
    "backbone.top_block.p7": "fpn_7",
    "proposal_generator.rpn_head.conv": "conv_rpn_fpn2",
    "proposal_generator.rpn_head.objectness_logits": "rpn_cls_logits_fpn2",
    "proposal_generator.rpn_head.anchor_deltas": "rpn_bbox_pred_fpn2",
    "roi_heads.box_head.fc1": "fc6",
    "roi_heads.box_head.fc2": "fc7",
    "roi_heads.box_predictor.cls_score": "cls_score",
    "roi_heads.box_predictor.bbox_pred": "bbox_pred",
    "roi_heads.mask_head.deconv": "conv5_mask",
    "roi_heads.mask_head.predictor": "mask_fcn_logits",
    "head.cls_score": "retnet_cls_pred_fpn3",
    "head.bbox_pred": "retnet_bbox_pred_fpn3",
}
CAFFE2_BRANCHES = {
    "shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"
}  # fmt: skip


def caffe2_module(module):
    """Detectron1's name of a convolution or fully connected layer."""
    name = re.sub(
        r"backbone\.bottom_up\.(res\d)\.(\d)\.(\w+)",
        lambda m: f"{m[1]}_{m[2]}_{CAFFE2_BRANCHES[m[3]]}",
        module,
    )
    name = re.sub(r"roi_heads\.box_head\.conv(\d)", r"head_conv\1", name)
    name = re.sub(r"roi_heads\.mask_head\.mask_fcn(\d)", r"_mask_fcn\1", name)
    name = re.sub(  # an activation follows each convolution of the subnet
        r"head\.(cls|bbox)_subnet\.(\d)",
        lambda m: f"retnet_{m[1]}_conv_n{int(m[2]) // 2}_fpn3",
        name,
    )
    return CAFFE2_MODULES.get(name, name)


def caffe2_name(name, norm):
    """Detectron1's name of a tensor; `norm` is "bn" (an affine transform per channel) or "gn"."""
    module, leaf = name.rsplit(".", 1)
    if not module.endswith(".norm"):
        return f"{caffe2_module(module)}_{leaf[0]}"
    layer = caffe2_module(module[: -len(".norm")])
    layer = "res_conv1" if (layer, norm) == ("conv1", "bn") else layer
    return f"{layer}_{norm}_{'s' if leaf == 'weight' else 'b'}"


def caffe2_value(name, value):
    """The class of the background is Detectron1's first; Detectron2 has it last, or not at all."""
    if "cls_score" in name and name.startswith("roi_heads."):
        return torch.cat([value[-1:], value[:-1]])
    if "roi_heads.box_predictor.bbox_pred" in name:
        return torch.cat([torch.full_like(value[:4], 7.0), value])
    if "mask_head.predictor" in name:
        return torch.cat([torch.full_like(value[:1], 7.0), value])
    return value


def arrays(state):
    return {name: value.numpy() for name, value in state.items()}


def caffe2_file(model, folder):
    state = {name: value for name, value in model.state_dict().items() if "." in name}
    norm = "bn" if any("running" in name for name in state) else "gn"
    blobs = {
        caffe2_name(name, norm): caffe2_value(name, value)
        for name, value in state.items()
        if "running" not in name  # merged into scale and bias
    }
    blobs["conv1_w_momentum"] = blobs["conv1_w"]  # one for each, in truth
    return write(folder / "model_final.pkl", {"blobs": arrays(blobs), "cfg": ""})


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


FORMATS = [caffe2_file, detectron2_file, training_file, bare_file]
# Detectron2 converts no RetinaNet from Detectron1, and its zoo has none.
ZOO = [
    (config, file)
    for config in (FASTER, MASK_GN, RETINA)
    for file in FORMATS
    if (config, file) != (RETINA, caffe2_file)
]


def write(path, content):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return str(path)


@functools.cache
def original(config, file):
    """The detector that `file` writes: no two of its tensors are equal but by chance."""
    torch.manual_seed(0)
    model = build_model(TeacherSpec(config, "", NARROW).load_config()).eval()
    for name, value in model.state_dict().items():
        if file is caffe2_file and "running" in name:
            # not in the file; what Detectron2's FrozenBN then takes
            value.fill_(0.0 if name.endswith("mean") else 1.0)
        elif value.dim() == 1:  # norms and biases, constant at first
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
def test_a_teacher_is_the_detector_of_its_file(config, file, tmp_path):
    model = original(config, file)
    spec = TeacherSpec(config, file(model, tmp_path), NARROW)
    detector, _, _ = spec.load(CPU)
    assert detector.backbone.state_dict().keys() == model.backbone.state_dict().keys()
    assert_holds(detector.backbone, model.backbone.state_dict())
    batch = image_batch((64, 96), (80, 64))
    with torch.no_grad():
        images = model.preprocess_image(batch).tensor
        expected = model.backbone(images)
    found, _ = Teacher(spec, CPU)(batch, images, preprocessing_of(model, "BGR"))
    assert found.keys() == expected.keys()
    for level, value in expected.items():  # its batch norms are folded: equal but for rounding
        torch.testing.assert_close(
            found[level], value, rtol=1e-4, atol=1e-4 * float(value.abs().max())
        )


@pytest.mark.parametrize("config, file", ZOO)
def test_a_student_starts_from_the_file(config, file, tmp_path):
    model = original(config, file)
    found = student(config, file(model, tmp_path))
    assert_holds(found, model.state_dict())
    more = found.state_dict().keys() - model.state_dict().keys()
    assert all(name.startswith("distiller.") for name in more)


def test_caffe2_names_are_detectron1s():
    """Spot checks of the table above, against names that appear in Detectron1's files."""
    names = {
        "backbone.bottom_up.res2.0.conv1.weight": "res2_0_branch2a_w",
        "backbone.bottom_up.res2.0.shortcut.norm.bias": "res2_0_branch1_bn_b",
        "backbone.bottom_up.stem.conv1.norm.weight": "res_conv1_bn_s",
        "backbone.fpn_lateral5.weight": "fpn_inner_res5_2_sum_w",
        "proposal_generator.rpn_head.conv.bias": "conv_rpn_fpn2_b",
        "roi_heads.box_head.fc1.weight": "fc6_w",
        "head.cls_subnet.6.weight": "retnet_cls_conv_n3_fpn3_w",
    }
    assert {name: caffe2_name(name, "bn") for name in names} == names


def test_a_retinanet_of_detectron1_is_no_teacher(tmp_path):
    """Detectron2 knows no `fpn_6`: the levels above res5 would stay random."""
    path = caffe2_file(original(RETINA, caffe2_file), tmp_path)
    with pytest.raises(ConfigError, match="backbone.top_block.p6.weight is missing"):
        Teacher(TeacherSpec(RETINA, path, NARROW), CPU)


def read(path):
    if path.endswith(".pkl"):
        with open(path, "rb") as f:
            return pickle.load(f)
    return torch.load(path)


@pytest.mark.parametrize(
    "file, name, damage",
    [
        (caffe2_file, "fpn_output3.bias", "missing"),
        (caffe2_file, "bottom_up.res3.0.conv2.norm.weight", "renamed"),
        (detectron2_file, "fpn_output3.bias", "renamed"),
        (detectron2_file, "bottom_up.res3.0.conv2.norm.running_mean", "missing"),
        (training_file, "bottom_up.stem.conv1.weight", "missing"),
        (training_file, "bottom_up.res3.0.conv2.norm.running_var", "renamed"),
        (bare_file, "bottom_up.res3.0.conv2.norm.running_mean", "renamed"),
        (bare_file, "bottom_up.res3.0.conv2.norm.running_var", "missing"),
    ],
)
def test_a_tensor_that_the_file_lacks_is_named(file, name, damage, tmp_path):
    name = f"backbone.{name}"
    path = file(original(FASTER, file), tmp_path)
    content = read(path)
    tensors = content.get("blobs", content.get("model", content))
    key = caffe2_name(name, "bn") if file is caffe2_file else name
    value = tensors.pop(key)
    if damage == "renamed":
        tensors[f"{key}_old"] = value
    write(Path(path), content)
    with pytest.raises(ConfigError, match=f"TEACHER.WEIGHTS: .*: {name} is missing$"):
        Teacher(TeacherSpec(FASTER, path, NARROW), CPU)


def msra_file(bottom_up, folder):
    """ImageNetPretrained/MSRA/R-50.pkl: Caffe2's names, batch norm with its statistics."""
    leaves = {"norm.weight": "bn_gamma", "norm.bias": "bn_beta"}
    blobs = {"conv1_b": np.zeros(32), "fc1000_w": np.zeros((9, 9)), "fc1000_b": np.zeros(9)}
    for name, value in arrays(bottom_up).items():
        module, norm, leaf = re.fullmatch(r"(.+?)\.(norm\.)?(\w+)", name).groups()
        layer = caffe2_module(f"backbone.bottom_up.{module}")
        if not norm:
            blobs[f"{layer}_w"] = value
            continue
        layer = "res_conv1" if layer == "conv1" else layer
        blobs[f"{layer}_{leaves.get(norm + leaf, f'bn_{leaf}')}"] = value
    return write(folder / "R-50.pkl", blobs)


def torchvision_file(bottom_up, folder):
    """ImageNetPretrained/torchvision/R-50.pkl."""
    content = {"model": arrays(bottom_up), "__author__": "torchvision", "matching_heuristics": True}
    return write(folder / "R-50.pkl", content)


@pytest.mark.parametrize("config", [FASTER, RETINA])
@pytest.mark.parametrize("file", [msra_file, torchvision_file])
def test_a_student_starts_from_a_classifier(config, file, tmp_path):
    bottom_up = original(config, detectron2_file).backbone.bottom_up
    path = file(bottom_up.state_dict(), tmp_path)
    found = student(config, path)
    assert_holds(found.backbone.bottom_up, bottom_up.state_dict())
    untouched = student(config, "").state_dict()  # the same seed
    rest = {k: v for k, v in untouched.items() if not k.startswith("backbone.bottom_up.")}
    assert_holds(found, rest)
    with pytest.raises(ConfigError, match=r"backbone.fpn_lateral\d.* is missing"):
        Teacher(TeacherSpec(config, path, NARROW), CPU)
