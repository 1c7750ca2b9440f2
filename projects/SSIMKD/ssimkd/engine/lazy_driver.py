"""Training and evaluation of a LazyConfig, as `engine.py` does it for YAML.

Detectron2's trainers and hooks are put together as in its `tools/lazyconfig_train_net.py`.
"""

import copy
import logging
import os
from typing import Any, Dict

from detectron2.config import instantiate
from detectron2.data.build import build_detection_train_loader
from detectron2.engine import AMPTrainer, SimpleTrainer, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch import nn

from ssimkd.checkpoint.export import export_student, warn_unless_exportable
from ssimkd.checkpoint.run_checkpointer import RunCheckpointer
from ssimkd.data.bad_images import CountSkipped, NamingMapper
from ssimkd.data.datasets import check_classes
from ssimkd.data.resumable_loader import ResumableLoader
from ssimkd.errors import ConfigError, as_config_error, as_output_error, building
from ssimkd.evaluation.evaluators import build_lazy_evaluator, save_results
from ssimkd.modeling.meta_arch import DistillMixin
from ssimkd.modeling.student import build_teacher, steps_to_skip, unwrap
from ssimkd.utils.compat import create_ddp_model
from ssimkd.utils.config_keys import datasets_of, names_of, target_of
from ssimkd.utils.random_state import preserve_random_state

from .finite_steps import FiniteSteps
from .hooks import CallAfterTraining, EvalHook, ExactResume
from .preemption import StopOnSignal, ignore_cluster_signals
from .preflight import prepare
from .run_record import describe_run
from .tensorboard_images import build_pictures
from .writers import build_writers

logger = logging.getLogger(__name__)


def lazy_train(cfg, resume: bool) -> Dict[str, Any]:
    """Trains a LazyConfig that has the fields of Detectron2's `tools/lazyconfig_train_net.py`.

    Args:
        cfg (DictConfig): model, optimizer, lr_multiplier, dataloader, train.
        resume (bool): go on from the last checkpoint in `cfg.train.output_dir`.

    Returns:
        dict: metrics of the last evaluation, on the main process.
    """
    original, cfg = cfg, copy.deepcopy(cfg)
    folder = cfg.train.output_dir
    model = lazy_model(cfg)
    if comm.is_main_process():
        with as_output_error(f"write to {folder}"):
            warn_unless_exportable(original, folder)
    logger.info("Model:\n%s", model)
    check_image_format(cfg, model, "train", "test")
    build_teacher(model)
    cfg.optimizer.params.model = model
    with building("optimizer"):
        optimizer = instantiate(cfg.optimizer)
    if target_of(cfg.dataloader.train) is build_detection_train_loader:
        cfg.dataloader.train._target_ = ResumableLoader
        cfg.dataloader.train.worker_init_fn = ignore_cluster_signals
    with building("dataloader.train"):
        loader = instantiate(cfg.dataloader.train)
    with building("train.ddp"):
        model = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    run = describe_run(original, unwrap(model))
    checkpointer = RunCheckpointer(model, folder, run=run, trainer=trainer)
    exact = ExactResume(loader, unwrap(model), cfg.train.checkpointer.period)
    results: Dict[str, Any] = {}

    def test() -> Dict[str, Any]:
        results.update(lazy_test(cfg, model))
        return results

    def export() -> None:
        with as_output_error(f"write the student to {folder}"):
            checkpointer.complete()
            export_student(original, unwrap(model).state_dict(), folder)

    exporting = CallAfterTraining(export)

    with building("lr_multiplier"):
        scheduler = instantiate(cfg.lr_multiplier)
    checkpoints = writer = None  # on the main process alone
    if comm.is_main_process():
        with building("train.checkpointer"):
            checkpoints = hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
        batch_size = OmegaConf.select(cfg, "dataloader.train.total_batch_size") or 0
        project = cfg.train.get("wandb_project", "")
        writers = build_writers(folder, cfg.train.max_iter, batch_size, project)
        writer = hooks.PeriodicWriter(writers, period=cfg.train.log_period)
    trainer.register_hooks(
        [
            FiniteSteps(steps_to_skip(unwrap(model))),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=scheduler),
            exact,
            checkpoints,
            exporting,  # before the last evaluation, whose failure must not cost it
            StopOnSignal(exact.collect, checkpointer),
            CountSkipped(loader),
            EvalHook(cfg.train.eval_period, test),
            build_pictures(
                unwrap(model),
                names_of(cfg, "TEST"),
                lambda: instantiate(cfg.dataloader.test).dataset,
            ),
            writer,
        ]
    )
    resumed = resume and checkpointer.has_checkpoint()
    with as_config_error("--resume" if resumed else "train.init_checkpoint"):
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    check_classes(unwrap(model), datasets_of(cfg, "TRAIN", "TEST"))
    prepare(unwrap(model), loader, resumed=resumed)
    if not resume:
        checkpointer.move_earlier_checkpoints()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
    exporting.raise_failure()
    return results


def lazy_model(cfg) -> nn.Module:
    """The model of a LazyConfig on its device.

    Raises:
        ConfigError: an argument is unknown or out of its range.
    """
    with building("model"):
        return instantiate(cfg.model).to(cfg.train.device)


def check_image_format(cfg, model: Any, *splits: str) -> None:
    """Raises ConfigError unless mappers and student agree on the images' format.

    A student that does not say which one it takes (FCOS) takes the first mapper's.

    Args:
        cfg (DictConfig): has a mapper for each split; one that does not say is left alone.
        model (nn.Module): a student; another model is left alone.
        splits (str): "train", "test".
    """
    source = "model.input_format"
    for split in splits if isinstance(model, DistillMixin) else ():
        key = f"dataloader.{split}.mapper.image_format"
        expected = getattr(model, "input_format", None)
        found = OmegaConf.select(cfg, key) or expected
        if expected and found != expected:
            raise ConfigError(f"{key} is {found}, {source} {expected}: make them equal")
        model.input_format, source = found, source if expected else key


def lazy_evaluate(cfg, resume: bool) -> Dict[str, Any]:
    """Evaluates `train.init_checkpoint` (or the last checkpoint); no teacher is built."""
    cfg = copy.deepcopy(cfg)
    if "distiller" in cfg.model:
        cfg.model.distiller = None
    model = lazy_model(cfg)
    check_image_format(cfg, model, "test")
    model = create_ddp_model(model)
    check_classes(unwrap(model), datasets_of(cfg, "TEST"))
    checkpointer = RunCheckpointer(model, cfg.train.output_dir, whole=True)
    resumed = resume and checkpointer.has_checkpoint()
    with as_config_error("--resume" if resumed else "train.init_checkpoint"):
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    return lazy_test(cfg, model)


def lazy_test(cfg, model: nn.Module) -> Dict[str, Any]:
    """Evaluates a model by `cfg.dataloader`, without a trace in the random state."""
    cfg = copy.deepcopy(cfg)
    if "evaluator" not in cfg.dataloader or not names_of(cfg, "TEST"):
        return {}
    folder = os.path.join(cfg.train.output_dir, "inference")
    with preserve_random_state():
        with building("dataloader.test or dataloader.evaluator"):
            node = cfg.dataloader.test
            node.mapper = NamingMapper(instantiate(node.mapper))
            loader = instantiate(node)
            evaluator = build_lazy_evaluator(cfg.dataloader.evaluator, folder)
        loader.worker_init_fn = ignore_cluster_signals  # as DistillTrainer.build_test_loader
        results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    save_results(results, cfg.train.output_dir)
    return results
