"""Several teachers at once: a loss term each, weights and trainable parts per teacher."""

import logging

import pytest
import torch
from conftest import image_batch, shapes_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError, Distiller, Distillers
from ssimkd.engine.preflight import prepare
from ssimkd.losses import SSIMLoss

KEY = "MODEL.DISTILL"
CONFIG = "configs/shapes/teacher.yaml"
BATCH = image_batch((96, 96), (96, 128))
ALONE = (f"{KEY}.TEACHER.CONFIG", "", f"{KEY}.TEACHER.WEIGHTS", "")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of two teachers: the shapes teacher, and one with half as many channels."""
    folder, paths = tmp_path_factory.mktemp("teachers"), []
    for seed, channels in ((0, 64), (1, 32)):
        torch.manual_seed(seed)
        model = build_model(shapes_cfg("teacher", "MODEL.FPN.OUT_CHANNELS", channels))
        paths.append(str(folder / f"{channels}.pth"))
        torch.save({"model": model.state_dict()}, paths[-1])
    return paths


def entries(files, **second):
    wide = {"CONFIG": CONFIG, "WEIGHTS": files[0]}
    narrow = {"CONFIG": CONFIG, "WEIGHTS": files[1], "OPTS": ["MODEL.FPN.OUT_CHANNELS", 32]}
    return [wide, {**narrow, "ADAPTER": "conv1x1", **second}]


def build(teachers, *opts):
    torch.manual_seed(1)
    cfg = shapes_cfg("ssimkd", *ALONE, f"{KEY}.TEACHERS", teachers, *opts)
    return build_model(cfg).train()


def run(model):
    torch.manual_seed(5)
    with EventStorage(0) as storage:
        return model(BATCH), storage


def test_each_term_is_that_of_the_teacher_alone(files, student):
    model = build(entries(files, NAME="narrow", LOSS_WEIGHT=0.5))
    losses, storage = run(model)
    assert {"ssim_kd_loss_teacher1", "ssim_kd_loss_narrow"} <= set(losses)
    assert {"teacher1/ssim_kd/p2", "narrow/ssim_kd/p5"} <= set(storage.latest())
    alone, _ = run(student(f"{KEY}.TEACHER.WEIGHTS", files[0]))
    assert torch.equal(losses["ssim_kd_loss_teacher1"], alone["ssim_kd_loss"])
    second = model.distiller["narrow"]
    torch.manual_seed(5)
    with EventStorage(0) as storage:
        images = model.preprocess_image(BATCH).tensor
        second(BATCH, model.backbone(images), images, model.preprocessing)
    levels = [storage.latest()[f"ssim_kd/{level}"][0] for level in ("p2", "p3", "p4", "p5")]
    expected = 16 * 0.5 * sum(levels)  # SSIM.WEIGHT in configs/shapes/ssimkd.yaml, LOSS_WEIGHT
    assert losses["ssim_kd_loss_narrow"].item() == pytest.approx(expected, rel=1e-5)


def test_trainable_parts_bear_the_teachers_name(files):
    model = build(entries(files))
    own = {name for name in model.state_dict() if name.startswith("distiller.")}
    assert own == {
        f"distiller.teacher2.adapters.{level}.{part}"
        for level in ("p2", "p3", "p4", "p5")
        for part in ("weight", "bias")
    }
    losses, _ = run(model)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.distiller.parameters())


def test_losses_and_levels_may_differ_by_teacher(files):
    model = build(entries(files, LOSSES=["l1", "l2"], IN_FEATURES=["p3"]))
    losses, storage = run(model)
    assert {"ssim_kd_loss_teacher1", "l1_kd_loss_teacher2", "l2_kd_loss_teacher2"} <= set(losses)
    assert "teacher2/l1_kd/p3" in storage.latest()
    assert "teacher2/l1_kd/p2" not in storage.latest()


def test_one_key_switches_all_of_them_off(files):
    model = build(entries(files), f"{KEY}.LOSSES", ())
    losses, _ = run(model)
    expected, _ = run(build([], f"{KEY}.LOSSES", ()))
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert not any(name.startswith("distiller.") for name in model.state_dict())


def taught(files, a=None, b=None):
    """A student of the same teacher twice, with options of each of the two Distillers."""

    def distiller(options):
        return Distiller(
            teacher=dict(config=CONFIG, weights=files[0]),
            losses=[SSIMLoss(weight=16.0)],
            in_features=["p2", "p3", "p4", "p5"],
            **(options or {}),
        )

    both = Distillers(a=distiller(a), b=distiller(b))
    model = build([], f"{KEY}.LOSSES", ())
    both.attach(model.backbone.output_shape())
    model.distiller = both
    return model


def test_from_python_teachers_are_named_by_keyword(files):
    losses, _ = run(taught(files))
    assert torch.equal(losses["ssim_kd_loss_a"], losses["ssim_kd_loss_b"])


@pytest.mark.parametrize(
    "key, value, option",
    [
        ("MASK_PADDING", False, "mask_padding"),
        ("WARMUP_ITERS", 4, "warmup_iters"),
        ("LEVEL_WEIGHTS", [0.0, 1.0, 2.0, 3.0], "level_weights"),
    ],
)
def test_an_option_is_the_teachers_own(files, student, key, value, option):
    losses, _ = run(taught(files, b={option: value}))
    for name, opts in (("a", ()), ("b", (f"{KEY}.{key}", value))):
        alone, _ = run(student(f"{KEY}.TEACHER.WEIGHTS", files[0], *opts))
        assert torch.equal(losses[f"ssim_kd_loss_{name}"], alone["ssim_kd_loss"])
    assert losses["ssim_kd_loss_a"] != losses["ssim_kd_loss_b"]


class Loader:
    """Counts how many images it is asked for."""

    def __init__(self):
        self.asked = []

    def peek(self, images):
        self.asked.append(images)
        return [BATCH]


def test_each_pair_is_checked_on_as_many_images_as_it_asks_for(files, caplog):
    caplog.set_level(logging.INFO)
    loader = Loader()
    prepare(taught(files, a={"check_images": 0}, b={"check_images": 2}), loader, resumed=False)
    assert loader.asked == [2]
    assert "Teacher b and student agree cell by cell" in caplog.text
    assert "eacher a " not in caplog.text


def test_the_teacher_to_blame_is_named(files):
    model = build(entries(files, NAME="narrow", ADAPTER="none"))
    message = f"^{KEY}.TEACHERS: narrow: {KEY}.ADAPTER: p2 has 64 channels in the student and 32"
    with pytest.raises(ConfigError, match=message):
        run(model)


def test_an_entry_without_weights_or_overrides_does_not_take_another_teachers(files):
    entry = {"CONFIG": "COCO-Detection/retinanet_R_50_FPN_1x", "IN_FEATURES": ["p3"]}
    common = (f"{KEY}.TEACHER.OPTS", ["SEED", 1], f"{KEY}.TEACHER.PRECISION", "bfloat16")
    cfg = shapes_cfg("ssimkd", f"{KEY}.TEACHER.CONFIG", "", f"{KEY}.TEACHERS", [entry], *common)
    assert cfg.MODEL.DISTILL.TEACHER.WEIGHTS  # of the single teacher that this config names
    spec = build_model(cfg).distiller["teacher1"].spec
    assert (spec.weights, list(spec.opts), spec.precision) == ("", [], "bfloat16")


@pytest.mark.parametrize(
    "change, message",
    [
        ([{"WEIGHT": 1.0}], "unknown key WEIGHT; there are NAME, CONFIG, WEIGHTS"),
        (["x.yaml"], "an entry is a mapping"),
        ([{"CONFIG": 3}], r"TEACHERS: Type mismatch .*TEACHER.CONFIG"),
        ([{"CONFIG": "a", "NAME": "x"}, {"CONFIG": "b", "NAME": "x"}], "the NAME x is there twice"),
        ([{"CONFIG": "a", "NAME": "x.y"}], "a NAME cannot be used"),
        ([{"CONFIG": "a", "NAME": "keys"}], "a NAME cannot be used"),
        ([{"LOSSES": ["sim"]}], "there is no loss 'sim'"),
        ([{"LOSS_WEIGHT": -1.0}], "TEACHER.LOSS_WEIGHT must be a finite number >= 0"),
        ([{"CONFIG": "a", "LOSSES": None}], f"{KEY}.TEACHERS: LOSSES is None: give it a value"),
        ([{"NAME": "x", "ADAPTER": "y"}], f"{KEY}.TEACHERS: x: {KEY}.ADAPTER: 'y' is none of"),
    ],
)
def test_wrong_entries_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        build(change)


def test_a_whole_loss_weight_and_any_name(files):
    teachers = entries(files, LOSS_WEIGHT=2, NAME="self")
    assert build(teachers).distiller["self"].loss_weight == 2.0


def test_what_is_no_distiller_is_refused():
    with pytest.raises(ConfigError, match="no Distiller's"):
        Distillers(losses=[])


@pytest.mark.parametrize("key, value", [("TEACHER.CONFIG", CONFIG), ("INHERIT", ["neck"])])
def test_one_and_several_exclude_each_other(files, key, value):
    with pytest.raises(ConfigError, match=f"{KEY}.{key} and .TEACHERS are both set"):
        build(entries(files), f"{KEY}.{key}", value)
