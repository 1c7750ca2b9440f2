"""The experiments' configs: what their names say, YAML against LazyConfig, and a training step.

Models are built on the "meta" device, which knows shapes but holds no values, wherever no value is
needed: R101 and X152 then take a moment.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, image_batch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.structures import Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from ssimkd import ConfigError, add_ssimkd_config
from ssimkd.engine.arguments import load_config
from ssimkd.modeling.levels import match_levels
from ssimkd.modeling.several_teachers import distillers_of
from ssimkd.teacher.inherit import inherit
from ssimkd.teacher.spec import TeacherSpec
from ssimkd.utils.compat import FCOS, has_compiled_ops, model_zoo

PATHS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "configs").rglob("*.*")
    if path.suffix in (".yaml", ".py") and "shapes" not in path.parts
)
BASES = {
    "Base-RCNN-FPN": "Base-RCNN-FPN.yaml",
    "Base-RetinaNet": "Base-RetinaNet.yaml",
    "Base-Keypoint-RCNN-FPN": "COCO-Keypoints/Base-Keypoint-RCNN-FPN.yaml",
    "Base-Panoptic-FPN": "COCO-PanopticSegmentation/Base-Panoptic-FPN.yaml",
}
YAML = {path.stem: str(path) for path in PATHS if path.suffix == ".yaml" and path.stem not in BASES}
LAZY = {path.stem: str(path) for path in PATHS if path.suffix == ".py"}
PAGE = "projects/SSIMKD/README.md"
FCOS_ONLY = "ssimkd_fcos_R50_1x_from_retinanet_R101"  # Detectron2 has no YAML config for FCOS
RUNNABLE = sorted(set(LAZY) - ({FCOS_ONLY} if FCOS is None else set()))

# What each part of a name says: <loss>_<detector>_<student>_<schedule>_from_<teacher>_<suffix>.
KD = "MODEL.DISTILL."
LOSSES = {
    "ssimkd": {},
    "ms_ssimkd": {KD + "LOSSES": ("ms_ssim",)},
    "l1kd": {KD + "LOSSES": ("l1",)},
    "l2kd": {KD + "LOSSES": ("l2",)},
    "vanilla": {KD + "LOSSES": ()},
}
RCNN = {"MODEL.META_ARCHITECTURE": "DistillRCNN"}
DETECTORS = {  # the zoo's name of the student, and its family's settings
    "faster_rcnn": ("COCO-Detection/faster_rcnn_{}_FPN_{}", RCNN),
    "mask_rcnn": ("COCO-InstanceSegmentation/mask_rcnn_{}_FPN_{}", RCNN),
    "cascade_mask_rcnn": ("Misc/cascade_mask_rcnn_{}_FPN_{}", RCNN),
    "keypoint_rcnn": ("COCO-Keypoints/keypoint_rcnn_{}_FPN_{}", RCNN),
    "panoptic_fpn": (
        "COCO-PanopticSegmentation/panoptic_fpn_{}_{}",
        {"MODEL.META_ARCHITECTURE": "DistillPanopticFPN"},
    ),
    "retinanet": (
        "COCO-Detection/retinanet_{}_FPN_{}",
        {
            "MODEL.META_ARCHITECTURE": "DistillRetinaNet",
            KD + "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        },
    ),
}
STUDENTS = {
    "R50": {},
    "R18": {  # torchvision's weights, the rest as for the zoo's R50
        "MODEL.WEIGHTS": "weights/R-18.pth",
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "INPUT.FORMAT": "RGB",
    },
}
SCHEDULES = {  # the zoo's, and what is changed of it
    "1x": ("1x", {}),
    "2x": ("1x", {"SOLVER.STEPS": (120_000, 160_000), "SOLVER.MAX_ITER": 180_000}),
    "3x": ("3x", {}),
}
TEACHERS = {  # <detector>_<teacher>; a name leaves out a detector that is the student's
    "faster_rcnn_R101": "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
    "faster_rcnn_X101": "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
    "faster_rcnn_R101_X101": "",  # TEACHERS instead
    "retinanet_R50": "COCO-Detection/retinanet_R_50_FPN_3x.yaml",
    "retinanet_R101": "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
    "mask_rcnn_R101": "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml",
    "mask_rcnn_R101_LSJ": "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py",
    "mask_rcnn_X101": "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
    "cascade_R50": "Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml",
    "cascade_X152": "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml",
    "cascade_mask_rcnn_X152": "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml",
    "keypoint_rcnn_R101": "COCO-Keypoints/keypoint_rcnn_R_101_FPN_3x.yaml",
    "panoptic_fpn_R101": "COCO-PanopticSegmentation/panoptic_fpn_R_101_3x.yaml",
}
SUFFIXES = {
    "inherit": {},  # below: its value depends on the detector
    "adapter": {KD + "ADAPTER": "conv1x1"},
    "s": {KD + "SSIM.EXPONENTS": (0.0, 0.0, 1.0)},
    "cs": {KD + "SSIM.EXPONENTS": (0.0, 1.0, 1.0)},
    **{f"lambda{weight}": {KD + "SSIM.WEIGHT": float(weight)} for weight in (1, 2, 8, 16)},
    **{f"window{size}": {KD + "SSIM.WINDOW_SIZE": size} for size in (3, 5, 7, 21)},
    **{f"scope_{scope}": {KD + "SSIM.NORMALIZE_SCOPE": scope} for scope in ("image", "batch")},
    "p3p4": {KD + "IN_FEATURES": ["p3", "p4"]},
    "p3p4p5": {KD + "IN_FEATURES": ["p3", "p4", "p5"]},
    "p5p6p7": {KD + "IN_FEATURES": ["p5", "p6", "p7"]},
}
SHORT = {  # the first configs have names of their own
    "ssimkd_R50": "ssimkd_faster_rcnn_R50_1x_from_R101",
    "ms_ssimkd_R50": "ms_ssimkd_faster_rcnn_R50_1x_from_R101",
    "l1kd_R50": "l1kd_faster_rcnn_R50_1x_from_R101",
    "l2kd_R50": "l2kd_faster_rcnn_R50_1x_from_R101",
    "vanilla_R50": "vanilla_faster_rcnn_R50_1x",
}
NAME = re.compile(
    "({})_({})_({})_({})(?:_from_([A-Za-z0-9_]+?))?(?:_({}))?".format(
        *("|".join(part) for part in (LOSSES, DETECTORS, STUDENTS, SCHEDULES, SUFFIXES))
    )
)


def teacher_settings(detector, teacher):
    config = TEACHERS[teacher] if teacher in TEACHERS else TEACHERS[f"{detector}_{teacher}"]
    if config:
        return {KD + "TEACHER.CONFIG": config}
    one, other = (TEACHERS[f"{detector}_{name}"] for name in teacher.split("_"))
    names = teacher.lower().split("_")
    return {
        KD + "TEACHERS": [
            {"NAME": name, "CONFIG": config, "LOSS_WEIGHT": 0.5}
            for name, config in zip(names, (one, other))
        ]
    }


def named(name):
    """Every key and value that the name of an experiment stands for."""
    loss, detector, student, schedule, teacher, suffix = NAME.fullmatch(
        SHORT.get(name, name)
    ).groups()
    zoo_name, family = DETECTORS[detector]
    zoo_schedule, solver = SCHEDULES[schedule]
    settings = {**LOSSES[loss], **family, **STUDENTS[student], **solver}
    settings.update(teacher_settings(detector, teacher or "R101"))  # that of vanilla is not read
    settings.update(SUFFIXES[suffix] if suffix else {})
    if suffix == "inherit":
        heads = ["head"] if detector == "retinanet" else ["proposal_generator", "roi_heads"]
        settings[KD + "INHERIT"] = ["neck", *heads]
    return {
        **flat(zoo(zoo_name.format("R_50", zoo_schedule) + ".yaml")),
        **{key: plain(value) for key, value in settings.items()},
        "OUTPUT_DIR": f"output/{name}",
    }


def zoo(name):
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name))
    return cfg


def plain(value):
    """Tuples as lists."""
    return [plain(x) for x in value] if isinstance(value, (tuple, list)) else value


def flat(cfg, prefix=""):
    """Every key of a config and its value, as a plain dict."""
    out = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = plain(value)
    return out


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_the_zoos(name):
    assert flat(load_config(f"configs/{name}.yaml", [])) == flat(zoo(BASES[name]))


@pytest.mark.parametrize("name", sorted(YAML))
def test_a_config_is_the_zoos_but_for_what_its_name_says(name):
    assert flat(load_config(YAML[name], [])) == named(name)


def test_every_yaml_has_its_lazy_twin():
    assert set(LAZY) - set(YAML) == {FCOS_ONLY} and set(YAML) <= set(LAZY)


@pytest.mark.parametrize("path", map(str, PATHS))
def test_a_config_opens_with_its_purpose_and_command(path):
    text = Path(path).read_text()
    assert text.startswith("# ")
    stem = Path(path).stem
    if stem in BASES:
        return
    head = text[: re.search(r"^(?!#)", text, re.MULTILINE).start()]
    assert f"--config-file {path}" in head
    if stem not in SHORT:
        assert "# Cost: " in head
        twin = path.replace(".py", ".yaml")
        assert stem == FCOS_ONLY or Path(twin).read_text().startswith(head.replace(path, twin))


def test_the_readme_lists_every_config():
    """With the costs that its file opens with."""
    text = (ROOT / "configs/README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*?) \|", text, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(LAZY)
    for name, cost in rows:
        if name not in SHORT:
            head = Path(LAZY[name]).read_text().replace("\n# ", " ")
            said = re.findall(r"(\d+) (?:GPU-hours|more for)", head)
            assert said == re.findall(r"\d+", cost), name


def test_the_methods_page_lists_every_config_with_the_same_cost():
    tables = [(ROOT / page).read_text() for page in ("configs/README.md", PAGE)]
    costs = [
        dict(re.findall(r"^\| `(?:[\w/]*/)?(\w+)` \|[^|]*\| ([^|]*?) \|", text, re.MULTILINE))
        for text in tables
    ]
    assert costs[0] == {name: cost for name, cost in costs[1].items() if name in LAZY}


@cache
def on_meta(name, suffix):
    """The student of a config, without values."""
    cfg = load_config((YAML if suffix == ".yaml" else LAZY)[name], [])
    if suffix == ".yaml":
        cfg.defrost()
        cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return cfg, build_model(cfg) if suffix == ".yaml" else instantiate(cfg.model)


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
        return {name: type(thing)}
    return {
        key: value
        for part, child in parts.items()
        for key, value in settings(child, f"{name}.{part}").items()
    }


def less_defaults(found):
    """Less the one default that only a LazyConfig's model writes down: a loss weight of 1."""
    return {k: v for k, v in found.items() if not (k.endswith(".loss_weight.loss_cls") and v == 1)}


@pytest.mark.parametrize("name", sorted(YAML))
def test_yaml_and_lazy_are_one_experiment(name):
    """Same parts with the same settings; same optimizer, schedule, data and files."""
    (cfg, a), (lazy, b) = on_meta(name, ".yaml"), on_meta(name, ".py")
    assert a.state_dict().keys() == b.state_dict().keys()
    assert less_defaults(settings(a)) == less_defaults(settings(b))
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


@cache
def teacher_on_meta(config):
    spec = TeacherSpec(config)
    cfg = spec.load_config()
    with torch.device("meta"):
        return spec.build(cfg, torch.device("meta"))


@pytest.mark.parametrize("name", [name for name in RUNNABLE if not name.startswith("vanilla")])
def test_the_teacher_is_in_the_zoo_and_fits(name):
    _, student = on_meta(name, ".py")
    for _, distiller in distillers_of(student):
        config = distiller.spec.config
        assert model_zoo.get_checkpoint_url(config)
        if "dconv" in config and not has_compiled_ops():
            assert distiller.spec.load_config()  # cannot be built here
            continue
        teacher = teacher_on_meta(config)
        shapes = teacher.backbone.output_shape()
        for level, matched in match_levels(distiller.student_shapes, shapes).items():
            assert distiller.student_shapes[level].channels == shapes[matched].channels == 256
        inherit(student, teacher, distiller.inherit, absent=[])


@pytest.mark.skipif(FCOS is not None, reason="this Detectron2 has FCOS")
def test_without_fcos_its_config_says_so():
    with pytest.raises(ConfigError, match="no FCOS: it came with v0.6"):
        load_config(LAZY[FCOS_ONLY], [])


@pytest.mark.skipif(FCOS is None, reason="this Detectron2 has no FCOS")
def test_fcos_is_the_zoos():
    cfg = load_config(LAZY[FCOS_ONLY], [])
    expected = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
    del cfg.model.distiller
    cfg.model._target_, cfg.train.output_dir = expected.model._target_, expected.train.output_dir
    assert cfg == expected


# One config of each family: the embedded data and a small teacher in place of COCO and the zoo's.
SMALL = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
SMALL += ["MODEL.RESNETS.NUM_GROUPS", 1, "MODEL.RESNETS.WIDTH_PER_GROUP", 4]
FAMILIES = {  # -> the teacher's overrides
    "ssimkd_R50": SMALL,
    "l1kd_faster_rcnn_R50_1x_from_cascade_R50_adapter": SMALL,
    "ssimkd_faster_rcnn_R50_1x_from_R101_X101": SMALL,
    "ssimkd_mask_rcnn_R50_1x_from_R101_LSJ": ["model.backbone.bottom_up.stages.depth=50"],
    "ssimkd_cascade_mask_rcnn_R50_1x_from_mask_rcnn_X101": SMALL,
    "ssimkd_keypoint_rcnn_R50_1x_from_R101": SMALL,
    "ssimkd_panoptic_fpn_R50_1x_from_R101": SMALL,
    "ssimkd_retinanet_R50_1x_from_R101": SMALL,
    "ssimkd_retinanet_R18_1x_from_R101": SMALL,
    FCOS_ONLY: SMALL,
}
TRAIN, VAL = "ssimkd_shapes_train", "ssimkd_shapes_val"


@pytest.fixture(scope="module")
def random_teacher(tmp_path_factory):
    """Config, overrides -> a checkpoint of that teacher with random weights."""

    @cache
    def save(config, opts):
        spec = TeacherSpec(config, opts=opts)
        torch.manual_seed(0)
        backbone = spec.build(spec.load_config(), torch.device("cpu")).backbone
        path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
        weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
        torch.save({"model": weights}, path)
        return str(path)

    return save


def yaml_student(name, weights_of, opts):
    """The student of a `.yaml`, a ResNet-18 on the CPU."""
    found = load_config(YAML[name], [])
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    overrides += ["DATASETS.TRAIN", (TRAIN,), "DATASETS.TEST", (VAL,)]
    overrides += ["MODEL.ROI_HEADS.NUM_CLASSES", 4, "MODEL.RETINANET.NUM_CLASSES", 4]
    overrides += ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    if found.MODEL.DISTILL.TEACHERS:
        teachers = [
            {**entry, "OPTS": opts, "WEIGHTS": weights_of(entry["CONFIG"], tuple(opts))}
            for entry in found.MODEL.DISTILL.TEACHERS
        ]
        overrides += [KD + "TEACHERS", teachers]
    else:
        weights = weights_of(found.MODEL.DISTILL.TEACHER.CONFIG, tuple(opts))
        overrides += [KD + "TEACHER.WEIGHTS", weights, KD + "TEACHER.OPTS", opts]
    return build_model(load_config(YAML[name], [str(x) for x in overrides]))


def lazy_student(name, weights_of, opts):
    """The same of a `.py`."""
    found = load_config(LAZY[name], [])
    head = "model.roi_heads" if "roi_heads" in found.model else "model"
    overrides = ["train.device=cpu", "train.init_checkpoint=", f"{head}.num_classes=4"]
    overrides += [f"dataloader.train.dataset.names={TRAIN}", f"dataloader.test.dataset.names={VAL}"]
    for key in ("model.distiller", "model.distiller.r101", "model.distiller.x101"):
        config = OmegaConf.select(found, f"{key}.teacher.config")
        if config:
            weights = weights_of(config, tuple(opts))
            overrides += [f"{key}.teacher.weights={weights}", f"{key}.teacher.opts={opts}"]
    cfg = load_config(LAZY[name], overrides)
    stages = cfg.model.backbone.bottom_up.stages
    stages.depth = 18
    stages.pop("stride_in_1x1", None)
    top = cfg.model.backbone.top_block
    if top.get("in_channels") == 2048:  # p6 from res5
        top.in_channels = 512
    return instantiate(cfg.model)


def full_batch():
    """Two images of different size with everything that any family needs."""
    batch = image_batch((64, 64), (64, 96), boxes=2)
    for x in batch:
        targets, polygon = x["instances"], [8.0, 8.0, 40.0, 8.0, 40.0, 40.0, 8.0, 40.0]
        targets.gt_masks = PolygonMasks([[polygon]] * len(targets))
        points = torch.tensor([24.0, 24.0, 2.0]).repeat(len(targets), 17, 1)
        targets.gt_keypoints = Keypoints(points)
        x["sem_seg"] = torch.ones(x["image"].shape[-2:], dtype=torch.long)
    return batch


def losses_of(model):
    torch.manual_seed(1)
    if hasattr(model, "proposal_generator"):
        model.proposal_generator.pre_nms_topk = {True: 50, False: 50}
    with EventStorage(0):
        return model.train()(full_batch())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_starts_on_the_embedded_data(name, random_teacher):
    """One training step; YAML and lazy give the same losses, and every parameter a gradient."""
    if name not in RUNNABLE:
        pytest.skip("this Detectron2 has no FCOS")
    lazy = lazy_student(name, random_teacher, FAMILIES[name])
    if name in YAML:
        student = yaml_student(name, random_teacher, FAMILIES[name])
        lazy.load_state_dict(student.state_dict())
        expected = losses_of(student)
    losses = losses_of(lazy)
    kd = [key for key in losses if "kd_loss" in key]
    assert len(kd) == len(list(distillers_of(lazy)))
    assert all(losses[key] > 0 for key in kd)
    if name in YAML:
        assert {k: v.item() for k, v in losses.items()} == {
            k: v.item() for k, v in expected.items()
        }
    sum(losses.values()).backward()
    # DistributedDataParallel waits for every parameter
    assert not [n for n, p in lazy.named_parameters() if p.requires_grad and p.grad is None]
