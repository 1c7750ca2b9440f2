"""Every family of the zoo as a student and as a teacher."""

import pytest
import ssimkd
import torch
from conftest import narrow_opts, rich_batch, save_teacher, zoo_cfg
from detectron2.config import instantiate
from detectron2.modeling import META_ARCH_REGISTRY, ProposalNetwork, build_model
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError, Distiller, DistillMixin
from ssimkd.losses import SSIMLoss
from ssimkd.modeling.paired_maps import paired_outputs
from ssimkd.teacher.spec import TeacherSpec
from ssimkd.utils.compat import FCOS, model_zoo

KEY = "MODEL.DISTILL"
BATCH = rich_batch((64, 64), (64, 96))
FPN = ["p2", "p3", "p4", "p5", "p6"]
DENSE = ["p3", "p4", "p5", "p6", "p7"]
FAMILIES = {
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": FPN,
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml": FPN,
    "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml": ["res4"],
    "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml": ["res5"],
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml": DENSE,
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml": FPN,
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml": FPN,
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml": FPN,
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml": FPN,
}
STUDENTS = {
    "GeneralizedRCNN": "DistillRCNN",
    "PanopticFPN": "DistillPanopticFPN",
    "RetinaNet": "DistillRetinaNet",
}


def run(model, batch=BATCH):
    torch.manual_seed(5)
    with EventStorage(0):
        return model(batch)


def student_of(config, levels, teacher, weights, *opts):
    """The student twin of a zoo config, and its teacher's config and weights."""
    cfg = zoo_cfg(config, f"{KEY}.IN_FEATURES", levels, f"{KEY}.TEACHER.CONFIG", teacher)
    cfg.MODEL.META_ARCHITECTURE = STUDENTS[cfg.MODEL.META_ARCHITECTURE]
    cfg.MODEL.DISTILL.TEACHER.OPTS = narrow_opts(teacher)
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = weights
    cfg.merge_from_list(list(opts))
    return build_model(cfg).train()


def pair(name, weights, *opts):
    """The detector of a zoo config and its student twin with the same weights."""
    stock = build_model(zoo_cfg(name)).train()
    student = student_of(name, FAMILIES[name], name, weights, *opts)
    student.load_state_dict(stock.state_dict())
    return stock, student


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_is_its_parent_and_a_loss(name, tmp_path):
    path = save_teacher(zoo_cfg(name), tmp_path / "teacher.pth")
    stock, student = pair(name, path)
    assert type(student).plain_architecture() is type(stock)
    assert student.state_dict().keys() == stock.state_dict().keys()
    losses, expected = run(student), run(stock)
    assert set(losses) - set(expected) == {"ssim_kd_loss"}
    assert all(torch.equal(losses[loss], value) for loss, value in expected.items())
    losses["ssim_kd_loss"].backward()
    reached = [n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()]
    assert reached and all(n.startswith("backbone.") for n in reached)


# Kind of pair -> the teacher's config, the student's config, the levels that both have
PAIRS = {
    "one-stage to two-stage": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        ["p3", "p4", "p5", "p6"],
    ),
    "two-stage to one-stage": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        ["p3", "p4", "p5", "p6"],
    ),
    "group norm to frozen batch norm": (
        "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml",
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        FPN,
    ),
    "C4 to FPN": (
        "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        ["p4"],
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_of_different_families(kind, tmp_path):
    teacher, config, levels = PAIRS[kind]
    weights = save_teacher(zoo_cfg(teacher), tmp_path / "teacher.pth")
    channels_differ = kind == "C4 to FPN" or "_gn" in teacher
    adapter = (f"{KEY}.ADAPTER", "conv1x1") if channels_differ else ()
    model = student_of(config, levels, teacher, weights, *adapter)
    loss = run(model)["ssim_kd_loss"]
    assert torch.isfinite(loss) and loss > 0
    strides = {level: model.distiller.student_shapes[level].stride for level in levels}
    shapes = model.distiller.teacher.shapes
    matched = model.distiller.teacher_levels
    assert {level: shapes[matched[level]].stride for level in levels} == strides


def test_a_c4_student_is_told_its_map():
    with pytest.raises(ConfigError, match="the student has no p2; it has res4"):
        student_of("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", FPN, "x", "y")


@META_ARCH_REGISTRY.register()
class DistillProposalNetwork(DistillMixin, ProposalNetwork):
    """Its parent has no preprocess_image in v0.5 and no input_format."""


def test_a_new_student_is_two_lines(tmp_path):
    """It is given RGB images and its teacher BGR: the teacher sees what it was trained on."""
    name = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    weights = save_teacher(zoo_cfg(name), tmp_path / "teacher.pth")
    meta_arch = ("MODEL.META_ARCHITECTURE", "DistillProposalNetwork")
    rgb = student_of(name, FPN, name, weights, *meta_arch, "INPUT.FORMAT", "RGB")
    images = [{**x, "image": x["image"].flip(0)} for x in BATCH]
    assert set(run(rgb, images)) == {"loss_rpn_cls", "loss_rpn_loc", "ssim_kd_loss"}
    assert type(rgb).plain_architecture() is ProposalNetwork
    rcnn = student_of(name, FPN, name, weights)
    found, expected = (
        paired_outputs(model, model.distiller, batch)[1]
        for model, batch in ((rgb, images), (rcnn, BATCH))
    )
    assert all(torch.equal(found[level], maps) for level, maps in expected.items())


def test_a_lazy_teacher_of_the_zoo(tmp_path):
    name = "new_baselines/mask_rcnn_regnety_4gf_dds_FPN_100ep_LSJ"
    size = {"depth": 13, "w_a": 36.44, "w_0": 24, "w_m": 2.49, "group_width": 8}  # RegNetY-200MF
    opts = [f"model.backbone.bottom_up.{key}={value}" for key, value in size.items()]
    opts += ["model.backbone.out_channels=16", "dataloader.train.mapper.image_format=RGB"]
    spec = TeacherSpec(name, "", opts)
    assert spec._zoo_weights().endswith(".pkl")  # the zoo knows it by this name
    spec.weights = save_teacher(spec.load_config().model, tmp_path / "teacher.pth")
    student = student_of("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", FPN, "x", "")
    student.distiller.spec = spec
    assert run(student)["ssim_kd_loss"] > 0
    assert student.distiller.teacher.preprocessing.input_format == "RGB"
    assert student.distiller.teacher.shapes["p3"].stride == 8


@pytest.mark.skipif(FCOS is None, reason="this Detectron2 has no FCOS")
def test_an_fcos_student_learns_from_retinanet(tmp_path):
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    weights = save_teacher(zoo_cfg(name), tmp_path / "teacher.pth")
    cfg = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    cfg._target_ = ssimkd.DistillFCOS
    cfg.image_format = "RGB"  # FCOS keeps none itself
    cfg.distiller = Distiller(
        teacher=dict(config=name, weights=weights, opts=narrow_opts(name)),
        losses=[SSIMLoss()],
        in_features=DENSE,
        adapter="conv1x1",
    )
    model = instantiate(cfg).train()
    assert model.preprocessing.input_format == "RGB"
    losses = run(model)
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr", "ssim_kd_loss"}


VITDET = """
from detectron2.config import LazyCall as L
from ssimkd.utils.compat import model_zoo
model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.backbone.net.update(
    img_size=128, embed_dim=32, depth=2, num_heads=2, window_block_indexes=[0], window_size=4
)
model.backbone.square_pad = 128
model.backbone.out_channels = 16
dataloader = dict(train=dict(mapper=dict(image_format="RGB")))
"""


def has_vit():
    try:
        import timm  # noqa: F401
        from detectron2.modeling import SimpleFeaturePyramid  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not has_vit(), reason="ViTDet needs v0.7 and timm")
def test_a_vitdet_teacher(tmp_path):
    config = tmp_path / "vitdet.py"
    config.write_text(VITDET)
    spec = TeacherSpec(str(config))
    spec.weights = save_teacher(spec.load_config().model, tmp_path / "teacher.pth")
    student = student_of("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", FPN, "x", "")
    student.distiller.spec = spec
    assert run(student)["ssim_kd_loss"] > 0
    images = student.preprocess_image(BATCH).tensor
    maps, padded = student.distiller.teacher(BATCH, images, student.preprocessing)
    assert padded == (128, 128) and maps["p4"].shape[-2:] == (8, 8)


@pytest.mark.skipif(FCOS is not None, reason="this Detectron2 has FCOS")
def test_without_fcos_the_import_says_so():
    with pytest.raises(ImportError, match="no FCOS: it came with v0.6"):
        from ssimkd.modeling.meta_arch import DistillFCOS  # noqa: F401
