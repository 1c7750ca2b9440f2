"""Images without labels in a training batch, and a distillation that ends."""

import pytest
import torch
from conftest import image_batch
from detectron2.utils.events import EventStorage
from ssimkd import KD_LOSS_REGISTRY, ConfigError
from ssimkd.modeling.meta_arch import warn_of_unlabeled
from ssimkd.modeling.nonfinite import explain_nonfinite
from ssimkd.modeling.several_teachers import takes_unlabeled
from test_students import BATCH, pair, rich_batch, save_teacher, zoo_cfg

KEY = "MODEL.DISTILL"
LABELED = image_batch((96, 96), (96, 128))
OTHERS = image_batch((64, 128), seed=9)  # with labels
UNLABELED = [{k: v for k, v in x.items() if k != "instances"} for x in OTHERS]
MIXED = [LABELED[0], *UNLABELED, LABELED[1]]


def losses_of(model, batch, iteration=0):
    torch.manual_seed(5)
    with EventStorage(iteration):
        return model(batch)


@pytest.mark.parametrize(
    "name, place",  # of the image without labels
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", 1),
        ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", 2),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", 0),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", 0),
    ],
)
def test_the_detector_sees_the_labeled_images_alone_and_the_teacher_all(name, place, tmp_path):
    stock, student = pair(name, save_teacher(zoo_cfg(name), tmp_path / "teacher.pth"))
    others = rich_batch((96, 64), seed=3)
    mixed = [*BATCH[:place], {"image": others[0]["image"]}, *BATCH[place:]]
    expected, found = losses_of(stock, BATCH), losses_of(student, mixed)
    assert all(torch.equal(found[loss], value) for loss, value in expected.items())
    first, second = (losses_of(student, x)["ssim_kd_loss"].item() for x in (BATCH, others))
    each_image_counts_the_same = (2 * first + second) / 3
    assert found["ssim_kd_loss"].item() == pytest.approx(each_image_counts_the_same, rel=1e-5)


def test_which_losses_learn_from_images_without_labels(student):
    known = {name for name, cls in KD_LOSS_REGISTRY if cls().learns_without_labels}
    heads = {name for name, cls in KD_LOSS_REGISTRY if "maps" not in cls().compares}
    assert known.isdisjoint({"fgd", "defeat", "icd"} | heads)
    names = [name for name, cls in KD_LOSS_REGISTRY if {"maps", "roi"} & set(cls().compares)]
    model = student(f"{KEY}.LOSSES", tuple(names))
    found, expected = losses_of(model, MIXED), losses_of(model, LABELED)
    changed = {n for n in names if not torch.equal(found[f"{n}_kd_loss"], expected[f"{n}_kd_loss"])}
    assert changed == known


def test_every_parameter_gets_a_gradient_from_a_mixed_batch(student):
    model = student(f"{KEY}.ADAPTER", "conv1x1", f"{KEY}.LOSSES", ("ssim", "fgd", "mgd", "icd"))
    sum(losses_of(model, MIXED).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("losses", [(), ("kd",)])
def test_without_a_loss_for_them_images_without_labels_are_left_alone(student, losses, caplog):
    model = student(f"{KEY}.LOSSES", losses)
    expected = losses_of(model, LABELED)
    model.backbone.register_forward_hook(lambda module, inputs, maps: seen.append(len(inputs[0])))
    seen = []
    warn_of_unlabeled.cache_clear()
    assert losses_of(model, MIXED) == expected and seen == [2]
    assert caplog.text.count('Training images without "instances" are left out') == 1
    if losses:
        with pytest.raises(ConfigError, match="none of them learns from images without labels"):
            takes_unlabeled(model)
    else:
        assert not takes_unlabeled(model)


def test_the_ratio_of_gradients_is_that_of_all_maps(student):
    def ratio(batch, backward):
        model = student(f"{KEY}.LOG_GRADIENTS", 1)
        torch.manual_seed(5)
        with EventStorage(0) as storage:
            backward(model(batch))
        return storage.latest()["gradient_ratio"][0]

    whole = ratio(LABELED, lambda losses: sum(losses.values()).backward())
    # the same images twice: each gradient is half as long, and there are twice as many
    twice = [*LABELED, *({k: v for k, v in x.items() if k != "instances"} for x in LABELED)]
    found = ratio(twice, lambda losses: sum(losses.values()).backward())
    assert found == pytest.approx(whole / 2**0.5, rel=1e-3)


def test_nan_in_an_image_without_labels_is_found(student):
    model = student(f"{KEY}.LOSSES", ("ssim", "fgd"))
    losses_of(model, MIXED)
    nan = {**UNLABELED[0], "image": torch.full((3, 64, 64), float("nan"))}
    text = explain_nonfinite(model, [nan, *LABELED])
    assert "ssim_kd/p2 is nan" in text and "fgd" not in text


def test_a_distillation_ends(student, monkeypatch):
    opts = (f"{KEY}.STOP_ITER", 4, f"{KEY}.COOLDOWN_ITERS", 2, f"{KEY}.LOSSES", ("ssim", "mgd"))
    model = student(*opts, f"{KEY}.ADAPTER", "conv1x1")
    full, half = (losses_of(model, MIXED, i)["ssim_kd_loss"].item() for i in (2, 3))
    assert half == pytest.approx(full / 2, rel=1e-6)
    teacher = model.distiller.teacher
    monkeypatch.setattr(teacher, "network", None)  # it is not run any more
    for iteration in (4, 5):
        losses = losses_of(model, MIXED, iteration)
        assert losses["ssim_kd_loss"] == losses["mgd_kd_loss"] == 0
        sum(losses.values()).backward()
    own = list(model.distiller.parameters())
    assert own and all(p.grad is not None and not p.grad.any() for p in own)
