"""Levels, adapters, padding and the errors that name what to change."""

import pytest
import torch
from conftest import image_batch
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError, Distiller
from ssimkd.losses import KD_LOSS_REGISTRY
from ssimkd.modeling.levels import check_cells, crop_to_common, match_levels
from ssimkd.teacher.preprocessing import preprocessing_of

KEY = "MODEL.DISTILL"


def kd_loss(model, batch, iteration=0):
    torch.manual_seed(0)
    with EventStorage(iteration):
        return model(batch)["ssim_kd_loss"].item()


def shapes(**strides):
    return {name: ShapeSpec(channels=8, stride=stride) for name, stride in strides.items()}


def test_levels_are_matched_by_stride_not_by_name():
    assert match_levels(shapes(p3=8, p4=16), shapes(p2=8, p3=16, p4=32)) == {"p3": "p2", "p4": "p3"}


def test_of_several_levels_of_a_stride_the_name_decides():
    assert match_levels(shapes(p5=32), shapes(res5=32, p5=32)) == {"p5": "p5"}
    with pytest.raises(ConfigError, match=f"{KEY}.IN_FEATURES: p5 .* several levels"):
        match_levels(shapes(p5=32), shapes(a=32, b=32))


def test_a_level_that_the_teacher_lacks():
    with pytest.raises(ConfigError, match=f"{KEY}.IN_FEATURES: p6 has stride 64.* no level"):
        match_levels(shapes(p6=64), shapes(p2=4, p3=8))


def test_a_level_that_the_student_lacks(student):
    with pytest.raises(ConfigError, match=f"{KEY}.IN_FEATURES: the student has no p9"):
        student(f"{KEY}.IN_FEATURES", ["p2", "p9"])


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
        (
            (f"{KEY}.LOSSES", ("sim",)),
            f"{KEY}.LOSSES: there is no loss 'sim'; there are .*l1, .*ssim",
        ),
        ((f"{KEY}.LOSSES", ("l1", "l1")), f"{KEY}.LOSSES names a loss twice"),
        ((f"{KEY}.ADAPTER", "linear"), f"{KEY}.ADAPTER: 'linear' is none of none, conv1x1"),
        ((f"{KEY}.SSIM.BORDER", "wrap"), f"{KEY}.SSIM: border must be one of renormalize"),
        ((f"{KEY}.SSIM.NORMALIZE", "max"), f"{KEY}.SSIM: normalize must be one of minmax"),
        ((f"{KEY}.SSIM.NORMALIZE_SCOPE", "row"), f"{KEY}.SSIM: normalize_scope must be one of"),
        ((f"{KEY}.SSIM.WINDOW_SIZE", 4), f"{KEY}.SSIM: window_size must be an odd"),
        ((f"{KEY}.SSIM.WEIGHT", -1.0), f"{KEY}.SSIM: weight must be a finite number >= 0"),
        ((f"{KEY}.WARMUP_ITERS", -1), f"{KEY}.WARMUP_ITERS must be an integer >= 0"),
        ((f"{KEY}.IN_FEATURES", []), f"{KEY}.IN_FEATURES is empty"),
        ((f"{KEY}.LEVEL_WEIGHTS", [1.0]), f"{KEY}.LEVEL_WEIGHTS has 1 numbers for the 4 levels"),
        ((f"{KEY}.LEVEL_WEIGHTS", [1.0, 1.0, 1.0, -1.0]), f"{KEY}.LEVEL_WEIGHTS must be a finite"),
        ((f"{KEY}.L1.NORMALIZE", "max"), f"{KEY}.L1: normalize must be"),  # though ssim is used
    ],
)
def test_wrong_settings_fail_at_construction(student, opts, message):
    with pytest.raises(ConfigError, match=message):
        student(*opts)


def test_several_losses_at_once(student):
    names = [name for name, _ in KD_LOSS_REGISTRY]
    model = student(f"{KEY}.LOSSES", tuple(names))
    with EventStorage(0) as storage:
        losses = model(image_batch((96, 96), (64, 80)))
    assert {f"{name}_kd_loss" for name in names} <= set(losses)
    assert {f"{name}_kd/{level}" for name in names for level in ("p2", "p5")} <= set(
        storage.latest()
    )


@pytest.mark.parametrize("boxes", [0, 2])
def test_trainable_parts_are_trained_with_the_student_and_leave_its_start_alone(student, boxes):
    plain = student(f"{KEY}.LOSSES", ()).state_dict()
    model = student(f"{KEY}.LOSSES", ("fkd", "fgd", "mgd"))
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("distiller.")}
    torch.testing.assert_close(own, plain, rtol=0, atol=0)
    with EventStorage(0):
        losses = model(image_batch((96, 96), (64, 96), boxes=boxes))
    sum(value for name, value in losses.items() if name.endswith("_kd_loss")).backward()
    parts = [name for name, _ in model.distiller.losses.named_parameters()]
    assert {name.split(".")[0] for name in parts} == {"fkd", "fgd", "mgd"}
    for name, parameter in model.distiller.named_parameters():
        assert parameter.grad is not None, name  # DistributedDataParallel would wait for it


def test_level_weights_are_factors_of_the_levels(student):
    factors = [1.0, 0.5, 0.0, 2.0]
    model = student(f"{KEY}.LOSSES", ("ssim", "l2"), f"{KEY}.LEVEL_WEIGHTS", factors)
    with EventStorage(0) as storage:
        losses = model(image_batch((96, 96), (96, 128)))
    for name, weight in (("ssim", 16), ("l2", 100)):
        levels = [storage.latest()[f"{name}_kd/p{i}"][0] for i in range(2, 6)]  # as without factors
        expected = weight * sum(f * v for f, v in zip(factors, levels))
        assert losses[f"{name}_kd_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_warm_up_is_a_linear_ramp(student):
    batch = image_batch((96, 96))
    full = kd_loss(student(), batch)
    model = student(f"{KEY}.WARMUP_ITERS", 10)
    ratios = [kd_loss(model, batch, iteration) / full for iteration in (0, 4, 9, 20)]
    # batch statistics of training mode do not depend on the weights' history: only the ramp differs
    assert ratios == pytest.approx([0.1, 0.5, 1.0, 1.0], rel=1e-4)


def test_another_size_divisibility_of_the_teacher_does_not_matter_much(student, monkeypatch):
    from detectron2.modeling.backbone import FPN

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
    assert padded["p2"].shape[-2:] == (64, 64)  # 256 / 4, the student's is 24 x 32
    # cells agree one by one; only what the teacher sees beyond the image's edge differs
    assert found == pytest.approx(expected, rel=0.02)


def test_maps_that_are_not_one_cell_per_stride_stop_the_run():
    check_cells("the student's p6", torch.zeros(1, 1, 3, 4), 64, (160, 224))  # 2.5 and 3.5 cells
    with pytest.raises(ConfigError, match=r"the teacher's p3 is \(11, 12\) cells.*stride 8"):
        check_cells("the teacher's p3", torch.zeros(1, 1, 11, 12), 8, (96, 96))


def test_crop_to_common_keeps_the_top_left():
    a, b = torch.rand(1, 1, 4, 7), torch.rand(1, 1, 5, 6)
    cropped, other = crop_to_common(a, b)
    assert torch.equal(cropped, a[..., :4, :6]) and torch.equal(other, b[..., :4, :6])


def test_padded_cells_are_left_out_unless_asked_for(student):
    batch = image_batch((96, 96), (96, 128))
    masked = student()
    whole = student(f"{KEY}.MASK_PADDING", False)
    assert kd_loss(masked, batch) != kd_loss(whole, batch)
    even = image_batch((96, 96), (96, 96))  # nothing is padded: no difference
    assert kd_loss(masked, even) == kd_loss(whole, even)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(in_features="p2"), f"{KEY}.IN_FEATURES must be a list of different levels"),
        (dict(loss_weight="1"), f"{KEY}.TEACHER.LOSS_WEIGHT must be a finite number >= 0, got '1'"),
        (dict(teacher=dict(config="x", compile="no")), f"{KEY}.TEACHER.COMPILE must be True or"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(options, message):
    """A LazyConfig takes any: of one teacher or of several."""
    with pytest.raises(ConfigError, match=message):
        Distiller(**{"teacher": dict(config="x"), "losses": [], **options})


def test_config_without_distill_says_what_to_call():
    from detectron2.config import get_cfg

    with pytest.raises(ConfigError, match="add_ssimkd_config"):
        Distiller(get_cfg())
