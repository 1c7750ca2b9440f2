"""Several teachers at once: each has its own losses, options and trainable parts."""

from pathlib import Path

import pytest
import torch
from conftest import image_batch, save_teacher, shapes_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError

KEY = "MODEL.DISTILL"
CONFIG = "configs/shapes/teacher.yaml"
BATCH = image_batch((96, 96), (96, 128))
LEVELS = ("p2", "p3", "p4", "p5")
ALONE = (f"{KEY}.TEACHER.CONFIG", "", f"{KEY}.TEACHER.WEIGHTS", "")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of two teachers: that of the shapes, and one with half as many channels."""
    folder = tmp_path_factory.mktemp("teachers")
    return [
        save_teacher(shapes_cfg("teacher", "MODEL.FPN.OUT_CHANNELS", n), folder / f"{n}.pth", seed)
        for seed, n in ((0, 64), (1, 32))
    ]


def entries(files, **second):
    wide = {"CONFIG": CONFIG, "WEIGHTS": files[0]}
    narrow = {"CONFIG": CONFIG, "WEIGHTS": files[1], "OPTS": ["MODEL.FPN.OUT_CHANNELS", 32]}
    return [wide, {**narrow, "ADAPTER": "conv1x1", **second}]


def build(teachers, *opts):
    torch.manual_seed(1)
    cfg = shapes_cfg("ssimkd", *ALONE, f"{KEY}.TEACHERS", teachers, *opts)
    return build_model(cfg).train()


def run(model, batch=BATCH):
    torch.manual_seed(5)
    with EventStorage(0) as storage:
        return model(batch), storage


def test_each_loss_is_that_of_its_teacher_alone(files, student):
    model = build(entries(files, NAME="narrow", LOSS_WEIGHT=0.5))
    losses, storage = run(model)
    alone, _ = run(student(f"{KEY}.TEACHER.WEIGHTS", files[0]))
    assert torch.equal(losses["ssim_kd_loss_teacher1"], alone["ssim_kd_loss"])
    assert "teacher1/ssim_kd/p2" in storage.latest()
    levels = [storage.latest()[f"narrow/ssim_kd/{level}"][0] for level in LEVELS]
    expected = 16 * 0.5 * sum(levels)  # SSIM.WEIGHT in configs/shapes/ssimkd.yaml, LOSS_WEIGHT
    assert losses["ssim_kd_loss_narrow"].item() == pytest.approx(expected, rel=1e-5)


def test_images_without_labels_go_to_the_teachers_whose_losses_take_them(files):
    model = build(entries(files, NAME="boxes", LOSSES=["fgd"]))
    expected, _ = run(model)
    mixed = [*BATCH, {"image": image_batch((64, 96), seed=3)[0]["image"]}]
    found, _ = run(model, mixed)
    changed = {name for name, loss in found.items() if not torch.equal(loss, expected[name])}
    assert changed == {"ssim_kd_loss_teacher1"}


def test_trainable_parts_bear_the_teachers_name(files):
    model = build(entries(files))
    own = {name for name in model.state_dict() if name.startswith("distiller.")}
    parts = {f"adapters.{level}.{part}" for level in LEVELS for part in ("weight", "bias")}
    assert own == {f"distiller.teacher2.{part}" for part in parts}
    sum(run(model)[0].values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.distiller.parameters())


def test_losses_and_levels_may_differ_by_teacher(files):
    losses, storage = run(build(entries(files, LOSSES=["l1", "l2"], IN_FEATURES=["p3"])))
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


def test_an_error_names_the_teacher(files):
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
        ([{"CONFIG": 3}], r"TEACHERS: MODEL.DISTILL.TEACHER.CONFIG 3: .*Type mismatch"),
        ([{"CONFIG": "a", "NAME": "x"}, {"CONFIG": "b", "NAME": "x"}], "the NAME x is there twice"),
        ([{"CONFIG": "a", "NAME": "x.y"}], "a NAME must not be empty"),
        ([{"CONFIG": "a", "NAME": "keys"}], "a NAME must not be empty"),
        ([{"CONFIG": "a", "LOSSES": None}], f"{KEY}.TEACHERS: LOSSES is None: give it a value"),
        ([{"NAME": "x", "ADAPTER": "y"}], f"{KEY}.TEACHERS: x: {KEY}.ADAPTER must be none or"),
    ],
)
def test_wrong_entries_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        build(change)


def test_a_path_object_names_a_file(files):
    assert (
        build(entries(files, WEIGHTS=Path(files[1]))).distiller["teacher2"].spec.weights == files[1]
    )


def test_a_whole_number_is_a_loss_weight(files):
    assert build(entries(files, LOSS_WEIGHT=2, NAME="self")).distiller["self"].loss_weight == 2.0


@pytest.mark.parametrize("key, value", [("TEACHER.CONFIG", CONFIG), ("INHERIT", ["neck"])])
def test_one_and_several_exclude_each_other(files, key, value):
    with pytest.raises(ConfigError, match=f"{KEY}.{key} and .TEACHERS are both set"):
        build(entries(files), f"{KEY}.{key}", value)


def test_losses_of_a_teacher_that_are_switched_off_are_refused(files):
    with pytest.raises(ConfigError, match=rf"{KEY}.LOSSES is \(\) and switches off"):
        build(entries(files, LOSSES=["ssim"]), f"{KEY}.LOSSES", ())
