"""The student: the stock detector plus one loss per distillation loss."""

import copy
import pickle

import pytest
import torch
from conftest import image_batch, shapes_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError, DistillMixin

BATCH = image_batch((96, 96), (96, 128))
KEY = "MODEL.DISTILL"


def losses_of(model, batch=BATCH):
    torch.manual_seed(5)
    with EventStorage(0) as storage:
        return model(batch), storage


class Old(torch.nn.Module):
    """A detector of one's own in the older style, which is not configurable."""

    def __init__(self, cfg):
        super().__init__()


def test_a_detector_that_is_not_configurable_is_refused_in_one_line():
    class DistillOld(DistillMixin, Old):
        pass

    with pytest.raises(ConfigError, match="META_ARCHITECTURE: Old cannot be a student without"):
        DistillOld(shapes_cfg("ssimkd"))


def test_a_loss_beside_the_parents(student):
    losses, storage = losses_of(student())
    names = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "ssim_kd_loss"}
    assert set(losses) == names
    levels = [storage.latest()[f"ssim_kd/{level}"][0] for level in ("p2", "p3", "p4", "p5")]
    # SSIM.WEIGHT is 16 in configs/shapes/ssimkd.yaml
    assert losses["ssim_kd_loss"].item() == pytest.approx(16 * sum(levels), rel=1e-5)


@pytest.mark.parametrize("key, value", [("SSIM.WEIGHT", 0.0), ("LOSSES", ())])
def test_weight_zero_and_no_loss_are_the_stock_detector(student, key, value):
    # An adapter and the teacher draw no random numbers that the detector would have drawn
    model = student(f"{KEY}.{key}", value, f"{KEY}.ADAPTER", "conv1x1")
    torch.manual_seed(1)
    stock = build_model(shapes_cfg("vanilla")).train()
    for (name, a), (other, b) in zip(model.named_parameters(), stock.named_parameters()):
        assert name == other and torch.equal(a, b)
    losses, _ = losses_of(model)
    expected, _ = losses_of(stock)
    for name, value in expected.items():
        assert torch.equal(losses[name], value)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for a, b in zip(model.parameters(), stock.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_the_teacher_may_have_other_classes(student):
    """Its maps are compared alone, so the loss is that of a student with the teacher's classes."""
    other, own = student("MODEL.ROI_HEADS.NUM_CLASSES", 7), student()
    assert other.roi_heads.num_classes != own.roi_heads.num_classes
    found, expected = (losses_of(model)[0]["ssim_kd_loss"] for model in (other, own))
    assert torch.equal(found, expected) and found > 0


def test_the_teacher_is_no_part_of_the_module(student):
    model = student()
    losses_of(model)
    stock = build_model(shapes_cfg("vanilla"))
    assert model.distiller.teacher is not None
    assert model.state_dict().keys() == stock.state_dict().keys()
    # the distiller, its lists of losses and of adapters, the one loss
    assert len(list(model.modules())) == len(list(stock.modules())) + 4
    teacher = model.distiller.teacher.model
    before = copy.deepcopy(teacher.state_dict())
    model.train()
    losses, _ = losses_of(model)
    sum(losses.values()).backward()
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_nothing_stays_registered_even_after_an_error(student):
    model = student()
    losses_of(model)
    assert not model.backbone._forward_hooks
    model.proposal_generator = None  # the parent's forward now fails
    with pytest.raises(AssertionError):
        losses_of(model)
    assert not model.backbone._forward_hooks


def test_inference_builds_no_teacher(student):
    model = student(
        "MODEL.DISTILL.TEACHER.CONFIG", "nowhere.yaml", "MODEL.DISTILL.ADAPTER", "conv1x1"
    )
    with torch.no_grad():
        model.eval()(image_batch((96, 96)))
    assert model.distiller.teacher is None


def test_a_loop_without_the_driver_is_warned_once(student, caplog):
    model = student()
    for _ in range(2):
        losses_of(model)
    (text,) = [x.getMessage() for x in caplog.records if x.name.startswith("ssimkd.modeling")]
    assert all(key in text for key in ("INHERIT", "CHECK_IMAGES", "SKIP_NONFINITE_STEPS"))
    caplog.clear()
    built = student()
    built.distiller.build_teacher(built.device)  # as the driver does
    losses_of(built)
    assert not [x for x in caplog.records if x.name.startswith("ssimkd.modeling")]


@pytest.mark.parametrize("sizes, boxes", [([(96, 96)], 0), ([(32, 32), (20, 32)], 1)])
def test_images_without_objects_and_maps_of_one_cell(student, sizes, boxes):  # p5 is 1 x 1
    losses, _ = losses_of(student(), image_batch(*sizes, boxes=boxes))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["ssim_kd_loss"] > 0


def test_autocast_trains_in_float32_losses(student):
    model = student()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = losses_of(model)
    assert losses["ssim_kd_loss"].dtype == torch.float32
    full, _ = losses_of(student())
    # bfloat16 maps carry 8 bits: the loss may move in its second digit
    assert losses["ssim_kd_loss"].item() == pytest.approx(full["ssim_kd_loss"].item(), rel=0.05)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_copy_of_a_student_shares_its_teacher(student):
    model = student()
    losses_of(model)
    assert copy.deepcopy(model).distiller.teacher is model.distiller.teacher
    assert pickle.loads(pickle.dumps(model)).distiller.teacher is None
