"""The configs and the commands of configs/README.md, up to the point where training would start.

Models are built on the "meta" device wherever no value is needed: it knows shapes but holds no
values, so that an R101 at full width takes a moment.
"""

import re
import shlex
from functools import cache

import pytest
import torch
from conftest import ROOT, rich_batch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from ssimkd import ConfigError, add_ssimkd_config
from ssimkd.engine.arguments import load_config
from ssimkd.modeling.levels import match_levels
from ssimkd.modeling.several_teachers import distillers_of
from ssimkd.teacher import heads
from ssimkd.teacher.inherit import inherit
from ssimkd.teacher.spec import TeacherSpec
from ssimkd.utils.compat import FCOS, has_compiled_ops, model_zoo
from ssimkd.utils.config_keys import without_pretraining

BASES = {
    "Base-RCNN-FPN": "Base-RCNN-FPN",
    "Base-RetinaNet": "Base-RetinaNet",
    "Base-Keypoint-RCNN-FPN": "COCO-Keypoints/Base-Keypoint-RCNN-FPN",
    "Base-Panoptic-FPN": "COCO-PanopticSegmentation/Base-Panoptic-FPN",
}
KD = "MODEL.DISTILL."
RCNN = {"MODEL.META_ARCHITECTURE": "DistillRCNN"}
RETINANET = {
    "MODEL.META_ARCHITECTURE": "DistillRetinaNet",
    KD + "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
    KD + "TEACHER.CONFIG": "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
}
FASTER = {**RCNN, KD + "TEACHER.CONFIG": "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"}
TORCHVISION = {  # its weights, in RGB
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.NAME": "build_torchvision_fpn_backbone",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "INPUT.FORMAT": "RGB",
}
R18 = {
    **TORCHVISION,
    "MODEL.BACKBONE.NAME": "build_retinanet_torchvision_fpn_backbone",
    "MODEL.TORCHVISION.NAME": "resnet18",
}
SEGMENTATION, PANOPTIC = "COCO-InstanceSegmentation/mask_rcnn_", "COCO-PanopticSegmentation/"
DETECTION, KEYPOINTS = "COCO-Detection/", "COCO-Keypoints/keypoint_rcnn_"
STUDENTS = {  # name of the config: the same detector in the zoo, and all that differs from it
    "ssimkd_R50": (DETECTION + "faster_rcnn_R_50_FPN_1x", FASTER),
    "vanilla_R50": (DETECTION + "faster_rcnn_R_50_FPN_1x", {**FASTER, KD + "LOSSES": []}),
    "ssimkd_retinanet_R50": (DETECTION + "retinanet_R_50_FPN_1x", RETINANET),
    "vanilla_retinanet_R50": (
        DETECTION + "retinanet_R_50_FPN_1x",
        {**RETINANET, KD + "LOSSES": []},
    ),
    "ssimkd_retinanet_R18": (DETECTION + "retinanet_R_50_FPN_1x", {**RETINANET, **R18}),
    "ssimkd_mobilenet_v2": (
        DETECTION + "faster_rcnn_R_50_FPN_1x",
        {**FASTER, **TORCHVISION, "MODEL.TORCHVISION.NAME": "mobilenet_v2"},
    ),
    "ssimkd_resnet18": (
        DETECTION + "faster_rcnn_R_50_FPN_1x",
        {**FASTER, **TORCHVISION, "MODEL.TORCHVISION.NAME": "resnet18"},
    ),
    "ssimkd_mask_rcnn_R50": (
        SEGMENTATION + "R_50_FPN_1x",
        {**RCNN, KD + "TEACHER.CONFIG": SEGMENTATION + "R_101_FPN_3x.yaml"},
    ),
    "ssimkd_cascade_R50": (
        "Misc/cascade_mask_rcnn_R_50_FPN_1x",
        {**RCNN, KD + "TEACHER.CONFIG": SEGMENTATION + "X_101_32x8d_FPN_3x.yaml"},
    ),
    "ssimkd_keypoint_rcnn_R50": (
        KEYPOINTS + "R_50_FPN_1x",
        {**RCNN, KD + "TEACHER.CONFIG": KEYPOINTS + "R_101_FPN_3x.yaml"},
    ),
    "ssimkd_panoptic_fpn_R50": (
        PANOPTIC + "panoptic_fpn_R_50_1x",
        {
            "MODEL.META_ARCHITECTURE": "DistillPanopticFPN",
            KD + "TEACHER.CONFIG": PANOPTIC + "panoptic_fpn_R_101_3x.yaml",
        },
    ),
}
FCOS_PY = "configs/ssimkd_fcos_R50.py"  # Detectron2 has no YAML config for FCOS
TABLE = [
    tuple(re.findall(r"`([^`]*)`", cell) for cell in row)
    for row in re.findall(
        r"^\|[^|]+\|([^|]*)\|([^|]*)\|", (ROOT / "configs/README.md").read_text(), re.M
    )
]
COMMANDS = [  # of each row of the table: its .yaml and .py command, or None
    tuple(cell[0] if cell else None for cell in row)
    for row in TABLE
    if any(row) and row[0] != [".yaml"]
]


def load(command):
    """The config of a command as the table has it."""
    name, *overrides = shlex.split(command)
    return load_config(f"configs/{name}", overrides)


def zoo(name):
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name + ".yaml"))
    return cfg


def flat(cfg, prefix=""):
    """Every key of a config and its value, as a plain dict; tuples as lists."""
    out = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out


def test_there_are_at_most_35_files_and_each_opens_with_its_command():
    files = [path for path in (ROOT / "configs").rglob("*.*") if path.parent.name != "__pycache__"]
    experiments = ("shapes", "photos")  # of this project; the other files are for COCO
    assert sum(path.parent.name not in experiments for path in files) <= 35
    for path in files:
        if path.suffix in (".yaml", ".py") and not path.stem.startswith("Base"):
            head = path.read_text().split("\n_BASE_")[0]
            assert f"--config-file {path.relative_to(ROOT)}" in head
            says_cost = "# Cost: " in head and "# Expected: " in head
            assert path.parent.name in experiments or says_cost


def test_each_yaml_has_a_lazy_config_and_both_are_in_the_table():
    yaml, lazy = zip(*COMMANDS)
    assert {f"{name}.yaml" for name in STUDENTS} == {
        command.split()[0] for command in yaml if command
    }
    assert {f"{name}.py" for name in STUDENTS} == {
        command.split()[0] for command in lazy if command
    } - {"ssimkd_fcos_R50.py"}
    for name in STUDENTS:
        assert f"{name}.yaml" in yaml and f"{name}.py" in lazy


@pytest.mark.parametrize("name", BASES)
def test_a_base_equals_the_zoos(name):
    assert flat(load_config(f"configs/{name}.yaml", [])) == flat(zoo(BASES[name]))


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_the_zoos_apart_from_what_is_listed(name):
    zoo_name, differs = STUDENTS[name]
    expected = {**flat(zoo(zoo_name)), **differs, "OUTPUT_DIR": f"output/{name}"}
    assert flat(load_config(f"configs/{name}.yaml", [])) == expected


@pytest.mark.skipif(FCOS is None, reason="this Detectron2 has no FCOS")
def test_fcos_is_the_zoos():
    cfg = load_config(FCOS_PY, [])
    expected = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
    del cfg.model.distiller
    cfg.model._target_, cfg.train.output_dir = expected.model._target_, expected.train.output_dir
    assert cfg == expected


@pytest.mark.skipif(FCOS is not None, reason="this Detectron2 has FCOS")
def test_without_fcos_its_config_says_so():
    with pytest.raises((ConfigError, ImportError), match="no FCOS: it came with v0.6"):
        load_config(FCOS_PY, [])


def build_on_meta(cfg):
    """The student of a config, without values."""
    cfg = without_pretraining(cfg)
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        # the boxes of anchors are values
        patch.setattr(heads, "describe_anchors", lambda generator: {"strides": generator.strides})
        return build_model(cfg) if isinstance(cfg, CfgNode) else instantiate(cfg.model)


@cache
def teacher_on_meta(config):
    spec = TeacherSpec(config)
    with torch.device("meta"):
        return spec.build(spec.load_config(), torch.device("meta"))


def check_teachers(student, modules):
    """Each teacher is in the zoo, and its levels and channels match the student's.

    Args:
        student (nn.Module): on the meta device.
        modules (sequence[str]): that start from the teacher's weights.
    """
    for _, distiller in distillers_of(student):
        config = distiller.spec.config
        assert model_zoo.get_checkpoint_url(config)
        if "dconv" in config and not has_compiled_ops():
            assert distiller.spec.load_config()  # cannot be built here
        elif distiller.enabled:
            teacher = teacher_on_meta(config)
            shapes = teacher.backbone.output_shape()
            for level, matched in match_levels(distiller.student_shapes, shapes).items():
                assert distiller.student_shapes[level].channels == shapes[matched].channels == 256
            inherit(student, teacher, modules, missing=[])


def settings(thing, name=""):
    """Every number, text or list that a model or one of its parts holds, by name."""
    if OmegaConf.is_config(thing):
        thing = OmegaConf.to_container(thing)
    if isinstance(thing, torch.Tensor):
        return {name: (tuple(thing.shape), thing.requires_grad)}
    if isinstance(thing, (bool, int, float, str, type(None))):
        return {name: thing}
    if isinstance(thing, (list, tuple)):
        parts = dict(enumerate(thing))
    elif isinstance(thing, dict):
        parts = thing
    elif type(thing).__module__.startswith(("torch.nn", "detectron2", "ssimkd")):
        parts = vars(thing)
    else:
        return {name: type(thing).__name__}  # each torch.fx graph has a class of its own
    return {
        key: value
        for part, child in parts.items()
        for key, value in settings(child, f"{name}.{part}").items()
        if not (key.endswith(".loss_weight.loss_cls") and value == 1)  # a default, written or not
        and key != ".image_format"  # not read where the model has `input_format`
        and not key.startswith(".driver_keys")  # of a LazyConfig only the driver knows them
    }


def check_same_training(cfg, lazy):
    """Schedule, data and weights of a YAML config and a LazyConfig are the same."""
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.output_dir == cfg.OUTPUT_DIR
    assert lazy.optimizer.lr == cfg.SOLVER.BASE_LR
    parameter = [torch.zeros(1, requires_grad=True)]
    schedule = build_lr_scheduler(cfg, torch.optim.SGD(parameter, cfg.SOLVER.BASE_LR))
    multiplier = instantiate(lazy.lr_multiplier)
    ends = (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)
    for iteration in (0, 500, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])):
        where = iteration / cfg.SOLVER.MAX_ITER
        assert schedule._multiplier(where) == pytest.approx(multiplier(where))
    data = lazy.dataloader
    assert data.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert (data.train.dataset.names,) == cfg.DATASETS.TRAIN
    assert (data.test.dataset.names,) == cfg.DATASETS.TEST
    keep_empty = not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert data.train.dataset.get("filter_empty", True) != keep_empty
    mapper = data.train.mapper
    assert tuple(mapper.augmentations[0].short_edge_length) == cfg.INPUT.MIN_SIZE_TRAIN
    assert mapper.image_format == data.test.mapper.image_format == cfg.INPUT.FORMAT
    assert mapper.use_instance_mask == cfg.MODEL.MASK_ON
    assert mapper.get("use_keypoint", False) == cfg.MODEL.KEYPOINT_ON


@pytest.mark.parametrize("yaml, lazy", COMMANDS)
def test_a_command_of_the_table_starts_and_both_forms_are_one_experiment(yaml, lazy):
    if lazy and "fcos" in lazy and FCOS is None:
        pytest.skip("this Detectron2 has no FCOS")
    if yaml:
        cfg = load(yaml)
        student = build_on_meta(cfg)
        check_teachers(student, cfg.MODEL.DISTILL.INHERIT)
    if lazy:
        lazy_cfg = load(lazy)
        lazy_student = build_on_meta(lazy_cfg)
        check_teachers(lazy_student, lazy_cfg.train.get("inherit", []))
    if yaml and lazy:
        assert student.state_dict().keys() == lazy_student.state_dict().keys()
        assert settings(student) == settings(lazy_student)
        check_same_training(cfg, lazy_cfg)


# One config of each family trains a step, with a narrow student and a narrow random teacher.
SMALL = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
SMALL += ["MODEL.RESNETS.NUM_GROUPS", 1, "MODEL.RESNETS.WIDTH_PER_GROUP", 4]
FAMILIES = [name for name in STUDENTS if name.startswith("ssimkd")] + ["ssimkd_fcos_R50"]


@pytest.fixture(scope="module")
def random_teacher(tmp_path_factory):
    """Config -> a checkpoint of that teacher, narrow, with random weights."""

    @cache
    def save(config):
        spec = TeacherSpec(config, opts=SMALL)
        torch.manual_seed(0)
        backbone = spec.build(spec.load_config(), torch.device("cpu")).backbone
        path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
        weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
        torch.save({"model": weights}, path)
        return str(path)

    return save


def yaml_student(path, random_teacher):
    """The student of a `.yaml`, with a ResNet-18 on the CPU."""
    config = load_config(path, []).MODEL.DISTILL.TEACHER.CONFIG
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", 18]
    opts += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.TORCHVISION.WEIGHTS", ""]
    opts += [KD + "TEACHER.WEIGHTS", random_teacher(config), KD + "TEACHER.OPTS", SMALL]
    return build_model(load_config(path, [str(x) for x in opts]))


def lazy_student(path, random_teacher):
    """The same of a `.py`."""
    cfg = without_pretraining(load_config(path, []))
    teacher, bottom_up = cfg.model.distiller.teacher, cfg.model.backbone.bottom_up
    teacher.weights, teacher.opts = random_teacher(teacher.config), SMALL
    if "stages" in bottom_up:  # Detectron2's ResNet
        bottom_up.stages.depth = 18
        bottom_up.stages.pop("stride_in_1x1", None)
    if cfg.model.backbone.top_block.get("in_channels") == 2048:  # p6 is made of res5
        cfg.model.backbone.top_block.in_channels = 512
    return instantiate(cfg.model)


def losses_of(model):
    torch.manual_seed(1)
    if hasattr(model, "proposal_generator"):
        model.proposal_generator.pre_nms_topk = {True: 50, False: 50}
    with EventStorage(0):
        return model.train()(rich_batch((64, 64), (64, 96)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_gives_the_same_losses_in_both_forms(name, random_teacher):
    """And every parameter gets a gradient, for which DistributedDataParallel waits."""
    if "fcos" in name and FCOS is None:
        pytest.skip("this Detectron2 has no FCOS")
    lazy = lazy_student(f"configs/{name}.py", random_teacher)
    losses = losses_of(lazy)
    if name in STUDENTS:
        student = yaml_student(f"configs/{name}.yaml", random_teacher)
        student.load_state_dict(lazy.state_dict())
        assert {k: v.item() for k, v in losses_of(student).items()} == {
            k: v.item() for k, v in losses.items()
        }
    assert losses["ssim_kd_loss"] > 0
    sum(losses.values()).backward()
    assert not [n for n, p in lazy.named_parameters() if p.requires_grad and p.grad is None]
