"""The hooks of a run. :func:`build_hooks` lists them in the order in which they act."""

import logging
import math
from typing import Any, Callable, Dict, List, Optional, Set

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from ssimkd.checkpoint.export import export_student
from ssimkd.checkpoint.run_checkpointer import RunCheckpointer
from ssimkd.data.datasets import categories_of
from ssimkd.data.resumable_loader import ResumableLoader
from ssimkd.errors import as_output_error, describe_error, is_user_error
from ssimkd.modeling.meta_arch import DistillMixin
from ssimkd.modeling.several_teachers import distillers_of
from ssimkd.teacher.heads import NAMES
from ssimkd.utils.random_state import get_random_state, set_random_state

from .preemption import StopOnSignal

logger = logging.getLogger(__name__)
# The largest ratio without a warning. It is measured in the first iteration, where the gradients of
# new heads are still small: the default weight of ssim gives 15 on Shapes.
MOST_RATIO = 1000.0
RUNNING = ("loss_normalizer",)  # training changes these attributes; state_dict leaves them out


def build_hooks(
    *,
    model: nn.Module,
    clipped: bool,
    loader: Any,
    checkpointer: RunCheckpointer,
    scheduler: Any,
    checkpoints: hooks.PeriodicCheckpointer,
    export: "CallAfterTraining",
    test: Callable[[], Any],
    read_metrics: Callable[[], None],
    eval_period: int,
    build_writers: Callable[[], List[EventWriter]],
    log_period: int,
    pictures: Optional[HookBase] = None,
    precise_bn: Optional[HookBase] = None,
) -> List[Optional[HookBase]]:
    """The hooks of either driver, in the order in which they act.

    Args:
        model (nn.Module): without DistributedDataParallel around it.
        clipped (bool): whether the gradients are clipped.
        loader (ResumableLoader or iterable): the training data.
        checkpointer (RunCheckpointer): writes a checkpoint when the run is stopped.
        scheduler (LRScheduler or ParamScheduler): sets the learning rate.
        checkpoints (PeriodicCheckpointer): writes checkpoints periodically.
        export (CallAfterTraining): writes the student.
        test (callable): evaluates and returns the metrics.
        read_metrics (callable): puts the losses of the last iterations into the event storage.
        eval_period (int): iterations between evaluations; 0 evaluates only at the end.
        build_writers (callable): makes the writers, on the main process.
        log_period (int): iterations between log lines.
        pictures, precise_bn (HookBase or None): optional hooks.
    """
    main = comm.is_main_process()
    resume = ExactResume(loader, model, checkpoints.period)

    def collect() -> None:
        read_metrics()
        resume.collect()

    return [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=scheduler),
        precise_bn,  # it changes the model, so it comes before the checkpoints
        resume,  # the checkpoints hold its state, so it comes before them
        checkpoints if main else None,
        export,  # the student must be written even if the last evaluation fails
        StopOnSignal(collect, checkpointer),
        LogSkippedImages(loader),
        WarnOnGradientRatio(model) if isinstance(model, DistillMixin) and not clipped else None,
        pictures,
        EvalHook(eval_period, test),
        ReadMetrics(read_metrics, log_period),
        hooks.PeriodicWriter(build_writers(), period=log_period) if main else None,
    ]


class ExactResume(HookBase):
    """Keeps the place in the data and the state of every process in the checkpoint.

    The state is that of the random generators, and the running number of foreground anchors by
    which RetinaNet and FCOS divide their losses.

    Args:
        loader (ResumableLoader or iterable): the data. Only a ResumableLoader keeps its place.
        model (nn.Module): without DistributedDataParallel around it.
        period (int): iterations between checkpoints.
    """

    def __init__(self, loader: Any, model: nn.Module, period: int) -> None:
        self.loader, self.model, self.period = loader, model, period
        self.states: List[Dict[str, Any]] = []

    def before_train(self) -> None:
        """Restores the generators and the running numbers, after everything is built."""
        start, last = self.trainer.start_iter, self.trainer.max_iter
        logger.info(
            "The first checkpoint is written after iteration %d of %d (SOLVER.CHECKPOINT_PERIOD or "
            "train.checkpointer.period is %d)",
            *(min(last, (start // self.period + 1) * self.period), last, self.period),
        )
        if not self.states:
            if self.trainer.start_iter > 0:
                logger.warning("The checkpoint has no random state: this resume is not exact")
            return
        if len(self.states) != comm.get_world_size():
            logger.warning(
                "The checkpoint is one of %d processes, not of %d: this resume is not exact. "
                "Weights and optimizer are restored, and the random generators are not",
                len(self.states),
                comm.get_world_size(),
            )
        else:
            set_random_state(self.states[comm.get_rank()])
        state = self.states[comm.get_rank() % len(self.states)]
        vars(self.model).update(state.get("model", {}))

    def after_step(self) -> None:
        """Collects the state of all processes before a checkpoint is written."""
        done = self.trainer.iter + 1
        if done % self.period == 0 or done >= self.trainer.max_iter:
            self.collect()

    def collect(self) -> None:
        """Collects the state now. Every process has to call this."""
        own = {name: vars(self.model)[name] for name in RUNNING if name in vars(self.model)}
        self.states = comm.gather({**get_random_state(), "model": own})

    def state_dict(self) -> Dict[str, Any]:
        """What the checkpoint keeps."""
        state: Dict[str, Any] = {"random": self.states}
        if isinstance(self.loader, ResumableLoader):
            state["data"] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Takes the checkpoint's state, which is restored when training starts."""
        self.states = state["random"]
        if "data" in state and isinstance(self.loader, ResumableLoader):
            self.loader.load_state_dict(state["data"])
        else:
            logger.warning("The training data starts anew: this resume is not exact")


class WarnOnGradientRatio(HookBase):
    """Warns at the start of a run if the distillation's gradient is far larger than the detector's.

    It measures the first iteration, and the first one in which a loss with a delay has a gradient.
    Where gradients are clipped a large share does little harm (docs/comparison.md).

    Args:
        model (DistillMixin): without DistributedDataParallel around it.
    """

    def __init__(self, model: DistillMixin) -> None:
        self.model = model
        self.measured: Dict[str, float] = {}
        losses = [loss for _, one in distillers_of(model) for loss in one.losses.values()]
        self.iterations = {0, *(loss.first_iteration for loss in losses)}

    def before_step(self) -> None:
        """Lets the student measure the two gradients."""
        if self.trainer.iter in self.iterations:
            self.model.report_gradients = self.measured.update

    def after_step(self) -> None:
        """Warns of the largest ratio, at the maps or at the predictions of a head."""
        if self.trainer.iter not in self.iterations:
            return
        self.model.report_gradients = None
        factors = [one.schedule.factor(self.trainer.iter) for _, one in distillers_of(self.model)]
        # the ratio of a single level says little: of some batches no anchor is sampled there
        places = ("gradient_ratio", *(f"gradient_ratio/{kind}" for kind in NAMES))
        found = [self.measured[place] for place in places if place in self.measured]
        ratio = max(filter(math.isfinite, found), default=0.0) / (max(factors, default=0.0) or 1.0)
        self.measured.clear()
        if ratio > MOST_RATIO:
            logger.warning(
                "The distillation's gradient is %.3g times the detector's own in iteration %d, "
                "%.2f %% of both, and gradients are not clipped: the detector hardly learns. Lower "
                "the losses' WEIGHT (`ssimkd weight` proposes one), or set "
                "SOLVER.CLIP_GRADIENTS.ENABLED (.yaml)",
                ratio,
                self.trainer.iter,
                100 * ratio / (1 + ratio),
            )


def build_export(cfg, model: nn.Module, checkpointer: RunCheckpointer) -> "CallAfterTraining":
    """The hook that completes the checkpoints and writes the student for stock Detectron2.

    Args:
        cfg (CfgNode or DictConfig): the run's config.
        model (nn.Module): without DistributedDataParallel around it.
        checkpointer (RunCheckpointer): of the run.
    """
    folder = checkpointer.save_dir

    def export() -> None:
        with as_output_error(f"write the student to {folder}"):
            checkpointer.write_final()
            export_student(cfg, model.state_dict(), folder, categories_of(cfg))

    return CallAfterTraining(export)


class CallAfterTraining(HookBase):
    """Calls a function on the main process after a training that succeeded.

    A failure of the function is logged and kept for :meth:`raise_failure`, so that the evaluation
    that follows is not lost.

    Args:
        function (callable): takes no arguments. A log line about a failure has its name.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.failure: Optional[Exception] = None

    def after_train(self) -> None:
        """Calls the function, but not after a failure of the training."""
        # only a run that succeeded counts up to max_iter
        if self.trainer.iter >= self.trainer.max_iter and comm.is_main_process():
            try:
                self.function()
            except Exception as error:
                self.failure = error
                name, bug = self.function.__name__, not is_user_error(error)
                logger.error("%s failed: %s", name, describe_error(error), exc_info=bug)

    def raise_failure(self) -> None:
        """Raises what the function raised. A driver calls it when all hooks are done."""
        if self.failure is not None:
            raise self.failure


class EvalHook(hooks.EvalHook):
    """Detectron2's hook, except that it does not evaluate after a failure in the last iteration.

    Detectron2's own hook would evaluate there and hang: it waits for the other processes, and they
    wait for a gradient of the process that has failed.
    """

    def after_train(self) -> None:
        """Evaluates, but not after a failure of the training."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class ReadMetrics(HookBase):
    """Puts the losses of the last iterations into the event storage when a log line is due.

    Args:
        read (callable): does it, see :class:`FiniteSteps`. Every process has to call it.
        period (int): iterations between log lines.
    """

    def __init__(self, read: Callable[[], None], period: int) -> None:
        self.read, self.period = read, period

    def after_step(self) -> None:
        """Reads them every `period` iterations and after the last one."""
        done = self.trainer.iter + 1
        if done % self.period == 0 or done >= self.trainer.max_iter:
            self.read()
        if not comm.is_main_process():  # no writer takes the pictures of VIS_PERIOD there
            self.trainer.storage.clear_images()

    def after_train(self) -> None:
        """Reads those of a run that failed, unless it would wait for processes that have ended."""
        if comm.get_world_size() == 1:
            self.read()


class LogSkippedImages(HookBase):
    """Logs at the end of a training which images were skipped.

    Args:
        loader (ResumableLoader or iterable): `skipped` of a ResumableLoader has a line per image.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def after_train(self) -> None:
        """Logs them, but not after a failure, when other processes may have ended already."""
        if self.trainer.iter < self.trainer.max_iter or not hasattr(self.loader, "skipped"):
            return
        own = self.loader.skipped | getattr(self.loader.unlabeled, "skipped", set())
        skipped: Set[str] = set().union(*comm.gather(own))
        if skipped:
            lines = "\n".join(sorted(skipped))
            logger.warning("%d images were skipped (--skip-bad-images):\n%s", len(skipped), lines)
