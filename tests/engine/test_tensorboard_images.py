"""The pictures on TensorBoard show the right things, and do not change the training."""

import numpy as np
import pytest
import torch
from conftest import shapes_cfg
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from ssimkd.engine import lazy_driver as lazy_engine
from ssimkd.engine import yaml_driver as engine
from ssimkd.engine.arguments import load_config
from ssimkd.engine.tensorboard_images import build_pictures
from ssimkd.evaluation.predictor import image_reader, load_detector
from ssimkd.utils.random_state import get_random_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NAME = "ssimkd_shapes_val"
TEACHER = ("MODEL.DISTILL.TEACHER.WEIGHTS", "configs/shapes/teacher.pth")


@pytest.fixture
def item(few_shapes):
    path = f"{few_shapes}/ssimkd_shapes/val/000000.jpg"
    return image_reader(shapes_cfg("vanilla"))(path)


def taken(model, item, steps):
    """(name, image, iteration) of a run of so many iterations."""
    hook = build_pictures(model, [NAME], lambda: [item])
    with EventStorage(0) as storage:
        hook.trainer = type("Trainer", (), {})
        hook.before_train()
        for hook.trainer.iter in range(steps):
            storage.iter = hook.trainer.iter
            hook.after_step()
        return storage._vis_data


def test_a_student_shows_detections_and_loss_maps(student, item):
    pictures = taken(student(*TEACHER, "VIS_PERIOD", 3), item, steps=7)
    names = [(name, at) for name, _, at in pictures]
    assert names == [(n, at) for at in (0, 2, 5) for n in ("detections", "loss_maps")]
    for _, image, _ in pictures:
        assert image.dtype == np.uint8 and image.shape[0] == 3
    height, width = item["height"], item["width"]
    scale = 480 / min(height, width)
    assert pictures[0][1].shape == (3, round(height * scale), round(width * scale))
    assert pictures[1][1].shape[1] > 4 * pictures[1][1].shape[2] * height / width / 7  # 4 levels
    # the same weights give the same pictures
    assert np.array_equal(pictures[0][1], pictures[2][1])
    assert np.array_equal(pictures[1][1], pictures[5][1])


def test_what_a_detector_finds_is_on_the_picture(item):
    model = load_detector(shapes_cfg("teacher"), "configs/shapes/teacher.pth")
    model.vis_period = 1
    ((name, image, _),) = taken(model, item, steps=0)
    assert name == "detections"  # it has no teacher
    found = model([item])[0]["instances"]
    left, top, _, bottom = (5 * found.pred_boxes.tensor[0]).round().int().tolist()
    plain = item["image"].flip(0).numpy().astype(int)  # BGR as the network takes it
    plain = plain.repeat(5, 1).repeat(5, 2)  # as the picture: 480 of 96 pixels
    changed = np.abs(image - plain).sum(0) > 60
    assert changed[top : bottom + 1, max(left, 3) - 3 : left + 4].any(1).mean() > 0.5


def test_drawing_changes_no_weight_mode_or_random_state(student, item):
    model = student(*TEACHER, "VIS_PERIOD", 1)
    frozen = model.roi_heads.box_head.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before, state = get_random_state(), {k: v.clone() for k, v in model.state_dict().items()}
    taken(model, item, steps=1)
    after = get_random_state()
    assert before["python"] == after["python"] and torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not frozen.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.distiller.build_teacher(torch.device("cpu"))
    assert not model.distiller.teacher.model.training


def test_a_run_without_a_test_set_or_period_has_no_pictures(student):
    with_period, without = student("VIS_PERIOD", 1), student()
    assert build_pictures(with_period, [], None) is None
    assert build_pictures(without, [NAME], None) is None


def yaml_run(out, period, train, val):
    cfg = shapes_cfg(
        "ssimkd", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (),
        "MODEL.DISTILL.CHECK_IMAGES", 0, "OUTPUT_DIR", str(out), "VIS_PERIOD", period,
        "DATASETS.TRAIN", (train,), "DATASETS.TEST", (val,),
    )  # fmt: skip
    engine.train(cfg, resume=False)


def lazy_run(out, period, train, val):
    opts = [f"train.output_dir={out}", "train.log_period=1", "dataloader.train.total_batch_size=2"]
    cfg = load_config("tests/engine/lazy_shapes.py", [*opts, f"+model.vis_period={period}"])
    cfg.train.check_images = 0
    cfg.dataloader.train.dataset.names, cfg.dataloader.test.dataset.names = train, val
    lazy_engine.train(cfg, resume=False)


@pytest.mark.parametrize("run", [yaml_run, lazy_run])
def test_both_drivers_show_them_on_tensorboard_and_train_the_same(
    run, tmp_path, few_names, monkeypatch
):
    monkeypatch.setattr(engine.DistillTrainer, "test", classmethod(lambda *args: {}))
    monkeypatch.setattr(lazy_engine, "test_model", lambda *args: {})
    trained = []
    for period in (0, 2):
        out = tmp_path / str(period)
        out.mkdir()
        seed_all_rng(5)
        run(out, period, *few_names)
        trained.append(torch.load(out / "model_final.pth")["model"])
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    events = EventAccumulator(str(tmp_path / "2"), {"images": 0, "scalars": 0}).Reload()
    for name in ("detections", "loss_maps"):
        assert [image.step for image in events.Images(name)] == [0, 1, 3]
    assert "ssim_kd/p3" in events.Tags()["scalars"]
    without = EventAccumulator(str(tmp_path / "0"), {"images": 0}).Reload()
    assert without.Tags()["images"] == []
