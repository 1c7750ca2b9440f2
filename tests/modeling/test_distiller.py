"""The losses, weights, adapters and padding of a Distiller, and the errors of its settings."""

import pytest
import torch
from conftest import image_batch
from detectron2.config import get_cfg
from detectron2.modeling.backbone import FPN
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError, Distiller
from ssimkd.losses import KD_LOSS_REGISTRY
from ssimkd.teacher.preprocessing import preprocessing_of

KEY = "MODEL.DISTILL"
LEVELS = ("p2", "p3", "p4", "p5")


def kd_loss(model, batch, iteration=0):
    torch.manual_seed(0)
    with EventStorage(iteration):
        return model(batch)["ssim_kd_loss"].item()


def test_channels_that_differ_need_an_adapter(student):
    narrow = ("MODEL.FPN.OUT_CHANNELS", 32)  # the teacher has 64
    adapted = student(*narrow, f"{KEY}.ADAPTER", "conv1x1")
    assert {conv.weight.shape for conv in adapted.distiller.adapters.values()} == {(64, 32, 1, 1)}
    assert kd_loss(adapted, image_batch((96, 96))) > 0
    with pytest.raises(ConfigError, match=f"{KEY}.ADAPTER: p2 has 32 channels .* and 64"):
        kd_loss(student(*narrow), image_batch((96, 96)))


@pytest.mark.parametrize(
    "opts, message",
    [
        ((f"{KEY}.LOSSES", ("sim",)), f"{KEY}.LOSSES: there is no loss 'sim'"),
        ((f"{KEY}.LOSSES", ("l1", "l1")), f"{KEY}.LOSSES names a loss twice"),
        ((f"{KEY}.ADAPTER", "linear"), f"{KEY}.ADAPTER must be none or conv1x1, got 'linear'"),
        ((f"{KEY}.L1.NORMALIZE", "max"), f"{KEY}.L1: normalize must be"),  # though ssim is used
        ((f"{KEY}.WARMUP_ITERS", -1), f"{KEY}.WARMUP_ITERS must be an integer >= 0"),
        ((f"{KEY}.TEACHER.LOSS_WEIGHT", -1.0), f"{KEY}.TEACHER.LOSS_WEIGHT must be a finite"),
        ((f"{KEY}.IN_FEATURES", []), f"{KEY}.IN_FEATURES is empty"),
        ((f"{KEY}.IN_FEATURES", ["p2", "p9"]), f"{KEY}.IN_FEATURES: the student has no p9"),
        ((f"{KEY}.LEVEL_WEIGHTS", [1.0]), f"{KEY}.LEVEL_WEIGHTS has 1 numbers for the 4 levels"),
        ((f"{KEY}.LEVEL_WEIGHTS", [1.0, 1.0, 1.0, -1.0]), f"{KEY}.LEVEL_WEIGHTS must be a finite"),
    ],
)
def test_wrong_settings_fail_at_construction(student, opts, message):
    with pytest.raises(ConfigError, match=message):
        student(*opts)


@pytest.mark.parametrize("losses", [(), ("kd",)])
def test_without_losses_of_maps_no_level_needs_to_be_named(student, losses):
    student(f"{KEY}.IN_FEATURES", [], f"{KEY}.LOSSES", losses)


def test_an_argument_that_a_teacher_does_not_have_is_named():
    with pytest.raises(ConfigError, match=f"{KEY}.TEACHER: .* 'weight'"):  # weights
        Distiller(teacher=dict(config="x", weight="y"), losses=[])


def test_a_config_without_the_node_says_what_to_call():
    with pytest.raises(ConfigError, match="add_ssimkd_config"):
        Distiller(get_cfg())


@pytest.mark.parametrize("boxes", [0, 2])
def test_all_losses_at_once_train_all_their_parts_and_leave_the_students_start_alone(
    student, boxes
):
    plain = student(f"{KEY}.LOSSES", ()).state_dict()
    names = [name for name, cls in KD_LOSS_REGISTRY if "maps" in cls().compares]
    model = student(f"{KEY}.LOSSES", tuple(names))
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("distiller.")}
    torch.testing.assert_close(own, plain, rtol=0, atol=0)
    with EventStorage(0) as storage:
        losses = model(image_batch((96, 96), (64, 96), boxes=boxes))
    assert {f"{name}_kd_loss" for name in names} <= set(losses)
    assert {f"{name}_kd/{level}" for name in names for level in LEVELS} <= set(storage.latest())
    sum(value for name, value in losses.items() if name.endswith("_kd_loss")).backward()
    for name, parameter in model.distiller.named_parameters():
        assert parameter.grad is not None, name  # DistributedDataParallel would wait for it


def test_level_weights_are_factors_of_the_levels(student):
    factors = [1.0, 0.5, 0.0, 2.0]
    model = student(f"{KEY}.LOSSES", ("ssim", "l2"), f"{KEY}.LEVEL_WEIGHTS", factors)
    with EventStorage(0) as storage:
        losses = model(image_batch((96, 96), (96, 128)))
    for name, weight in (("ssim", 16), ("l2", 100)):
        levels = [storage.latest()[f"{name}_kd/{level}"][0] for level in LEVELS]
        expected = weight * sum(f * v for f, v in zip(factors, levels))
        assert losses[f"{name}_kd_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_warm_up_is_a_linear_ramp(student):
    batch = image_batch((96, 96))
    full = kd_loss(student(), batch)
    model = student(f"{KEY}.WARMUP_ITERS", 10)
    ratios = [kd_loss(model, batch, iteration) / full for iteration in (0, 4, 9, 20)]
    assert ratios == pytest.approx([0.1, 0.5, 1.0, 1.0], rel=1e-4)


def test_another_size_divisibility_of_the_teacher_changes_the_loss_little(student, monkeypatch):
    batch = image_batch((96, 112))
    model = student()
    expected = kd_loss(model, batch)
    teacher = model.distiller.teacher
    backbone = teacher.model.backbone
    monkeypatch.setattr(
        FPN, "size_divisibility", property(lambda self: 256 if self is backbone else 32)
    )
    teacher.preprocessing = preprocessing_of(teacher.model, "BGR")
    padded = {}
    backbone.register_forward_hook(lambda module, args, maps: padded.update(maps))
    found = kd_loss(model, batch)
    assert padded["p2"].shape[-2:] == (64, 64)  # 256 / 4; the student's is 24 x 32
    # only what the teacher sees beyond the image's edge differs
    assert found == pytest.approx(expected, rel=0.02)


def test_padded_cells_are_left_out_unless_asked_for(student):
    masked, whole = student(), student(f"{KEY}.MASK_PADDING", False)
    padded, even = image_batch((96, 96), (96, 128)), image_batch((96, 96), (96, 96))
    assert kd_loss(masked, padded) != kd_loss(whole, padded)
    assert kd_loss(masked, even) == kd_loss(whole, even)
