"""The order of a run's hooks, and what they do when the run fails."""

import pytest
import torch
from conftest import image_batch, shapes_cfg
from detectron2.engine import TrainerBase, hooks
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError
from ssimkd.engine.hooks import (
    CallAfterTraining,
    EvalHook,
    ExactResume,
    LogSkippedImages,
    ReadMetrics,
    WarnOnGradientRatio,
)
from ssimkd.engine.preemption import StopOnSignal
from ssimkd.engine.yaml_driver import DistillTrainer, PreciseBN

ICD = ("MODEL.DISTILL.LOSSES", ("icd",), "MODEL.DISTILL.ICD.WEIGHT", 1e8)


class Trainer:
    """Has the attributes of a trainer that the hooks read."""

    max_iter = 4

    def __init__(self, iteration, start_iter=0):
        self.iter, self.start_iter = iteration, start_iter


def test_the_order_of_the_hooks(few_images, tmp_path):
    """The student is exported before the last evaluation, and all figures are written last."""
    trainer = DistillTrainer(shapes_cfg("vanilla", "OUTPUT_DIR", str(tmp_path)))
    assert [type(hook) for hook in trainer._hooks] == [
        hooks.IterationTimer,
        hooks.LRScheduler,
        ExactResume,
        hooks.PeriodicCheckpointer,
        CallAfterTraining,
        StopOnSignal,
        LogSkippedImages,
        EvalHook,
        ReadMetrics,
        hooks.PeriodicWriter,
    ]


def test_precise_batch_statistics_come_before_the_checkpoint(few_images, tmp_path):
    cfg = shapes_cfg("vanilla", "OUTPUT_DIR", str(tmp_path), "TEST.PRECISE_BN.ENABLED", True)
    cfg.MODEL.RESNETS.NORM = "BN"
    kinds = [type(hook) for hook in DistillTrainer(cfg)._hooks]
    assert kinds.index(PreciseBN) < kinds.index(hooks.PeriodicCheckpointer)


def test_precise_batch_statistics_need_no_teacher(few_images, tmp_path):
    opts = ("OUTPUT_DIR", str(tmp_path), "TEST.PRECISE_BN.ENABLED", True)
    trainer = DistillTrainer(shapes_cfg("ssimkd", *opts, "TEST.PRECISE_BN.NUM_ITER", 2))
    student = trainer.model
    distiller, before = student.distiller, student.backbone.bottom_up.stem.conv1.norm.running_mean
    distiller.teacher, before = None, before.clone()
    (hook,) = [hook for hook in trainer._hooks if isinstance(hook, PreciseBN)]
    hook.update_stats()
    assert not torch.equal(student.backbone.bottom_up.stem.conv1.norm.running_mean, before)
    assert student.distiller is distiller and distiller.teacher is None


@pytest.mark.parametrize("kind", [CallAfterTraining, lambda call: EvalHook(0, call)])
def test_a_run_that_failed_in_its_last_iteration_is_neither_exported_nor_evaluated(kind):
    called = []
    for iteration, expected in ((3, []), (4, [1])):  # only a run that succeeds counts up to 4
        hook = kind(lambda: called.append(1))
        hook.trainer = Trainer(iteration)
        hook.after_train()
        assert called == expected


def test_an_export_that_fails_does_not_cost_the_last_evaluation(caplog):
    def export():
        raise ConfigError("OUTPUT_DIR: no space left on device")

    evaluated, exporting = [], CallAfterTraining(export)
    trainer = TrainerBase()
    trainer.run_step = lambda: None
    trainer.register_hooks([exporting, EvalHook(0, lambda: evaluated.append(1))])
    trainer.train(0, 1)
    assert evaluated == [1]
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert error == "export failed: OUTPUT_DIR: no space left on device"
    with pytest.raises(ConfigError, match="^OUTPUT_DIR: no space"):
        exporting.raise_failure()


def test_a_resume_that_is_not_exact_is_logged(caplog):
    hook = ExactResume([], torch.nn.Module(), 10)
    hook.trainer = Trainer(3, start_iter=3)
    hook.before_train()
    hook.load_state_dict({"random": [{}, {}]})
    hook.before_train()
    warnings = [x.message for x in caplog.records if x.levelname == "WARNING"]
    assert len(warnings) == 3 and all("not exact" in message for message in warnings)


@pytest.mark.parametrize(
    "start, period, last, first", [(0, 5000, 900, 900), (0, 100, 900, 100), (250, 100, 900, 300)]
)
def test_a_run_says_when_it_first_saves(start, period, last, first, caplog):
    hook = ExactResume(None, torch.nn.Identity(), period)
    hook.trainer = Trainer(start, start)
    hook.trainer.max_iter = last
    with caplog.at_level("INFO", "ssimkd"):
        hook.before_train()
    assert f"first checkpoint is written after iteration {first} of {last} " in caplog.text


@pytest.mark.parametrize(
    ("opts", "warned"),
    [
        (("MODEL.DISTILL.SSIM.WEIGHT", 1e4), True),
        (("MODEL.DISTILL.SSIM.WEIGHT", 1e4, "MODEL.DISTILL.WARMUP_ITERS", 1000), True),
        (("MODEL.DISTILL.SSIM.WEIGHT", 4.0), False),
        (("MODEL.DISTILL.LOSSES", ("ssim", "kd"), "MODEL.DISTILL.KD.WEIGHT", 1e8), True),
        (("MODEL.DISTILL.LOSSES", ("ssim", "dkd"), "MODEL.DISTILL.DKD.WEIGHT", 1e8), True),
        ((*ICD, "MODEL.DISTILL.ICD.DETACH_ITERS", 1), True),
        (("MODEL.DISTILL.SSIM.WEIGHT", 1e4, "MODEL.DISTILL.LOG_GRADIENTS", 20), True),
    ],
)
def test_a_weight_that_drowns_the_detector_is_said_at_the_start(student, opts, warned, caplog):
    model = student(*opts)
    hook = WarnOnGradientRatio(model)
    with EventStorage() as storage:
        for iteration in range(2):
            storage.iter, hook.trainer = iteration, Trainer(iteration)
            hook.before_step()
            sum(model(image_batch((96, 96))).values()).backward()
            hook.after_step()
    text = "times the detector's own in iteration"
    assert caplog.text.count(text) == warned and model.report_gradients is None
    assert ("gradient_ratio" in storage.latest()) == ("MODEL.DISTILL.LOG_GRADIENTS" in opts)


@pytest.mark.parametrize(
    ("place", "ratio", "warned"),
    [("p6", float("inf"), False), ("p6", 2e3, False), ("roi", 2e3, True), ("roi", 2.0, False)],
)
def test_the_ratio_of_a_single_level_is_no_reason_to_warn(student, place, ratio, warned, caplog):
    hook = WarnOnGradientRatio(student())
    hook.trainer = Trainer(0)
    hook.measured = {"gradient_ratio": 3.0, f"gradient_ratio/{place}": ratio}
    hook.after_step()
    assert ("gradients are not clipped" in caplog.text) == warned


def test_no_gradient_warning_with_clipping(few_images, tmp_path):
    opts = ("OUTPUT_DIR", str(tmp_path), "SOLVER.CLIP_GRADIENTS.ENABLED")
    for clipped in (True, False):
        trainer = DistillTrainer(shapes_cfg("ssimkd", *opts, clipped))
        assert any(isinstance(x, WarnOnGradientRatio) for x in trainer._hooks) != clipped
