"""Training and evaluation of a LazyConfig. `yaml_driver.py` does the same for YAML.

The config has the fields of Detectron2's `tools/lazyconfig_train_net.py`: model, optimizer,
lr_multiplier, dataloader, train.
"""

import copy
import logging
import os
from typing import Any, Dict

from detectron2.config import instantiate
from detectron2.data.build import build_detection_train_loader
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from ssimkd.checkpoint.export import warn_unless_exportable
from ssimkd.checkpoint.reader import categories_in
from ssimkd.checkpoint.run_checkpointer import RunCheckpointer, checkpoints_in
from ssimkd.data.bad_images import NamingMapper
from ssimkd.data.datasets import (
    check_classes,
    check_trained_order,
    training_classes,
)
from ssimkd.data.resumable_loader import ResumableLoader
from ssimkd.errors import ConfigError, as_config_error, as_setting_error
from ssimkd.evaluation.evaluators import build_lazy_evaluator, save_results
from ssimkd.modeling.meta_arch import DistillMixin
from ssimkd.modeling.several_teachers import build_teachers, takes_unlabeled
from ssimkd.teacher.preprocessing import image_format_of
from ssimkd.utils.compat import create_ddp_model
from ssimkd.utils.config_keys import (
    datasets_of,
    for_inference,
    names_of,
    setting,
    target_of,
    unlabeled_batch,
    without_pretraining,
)
from ssimkd.utils.lazy_fields import naming_lazy_fields
from ssimkd.utils.random_state import preserve_random_state

from .finite_steps import build_step_trainer
from .hooks import build_export, build_hooks
from .preemption import ignore_cluster_signals
from .preflight import prepare
from .run_record import describe_run
from .settings import read_settings
from .tensorboard_images import build_pictures
from .writers import wandb_run

logger = logging.getLogger(__name__)


@naming_lazy_fields()
def train(cfg, resume: bool) -> Dict[str, Any]:
    """Trains a LazyConfig.

    Args:
        cfg (DictConfig): the config.
        resume (bool): go on from the last checkpoint in `cfg.train.output_dir`.

    Returns:
        dict: metrics of the last evaluation, on the main process.
    """
    with wandb_run(read_settings(cfg).wandb_project, cfg.train.output_dir):
        return _train(cfg, resume)


def _train(cfg, resume: bool) -> Dict[str, Any]:
    original, cfg = cfg, copy.deepcopy(cfg)
    folder, settings = cfg.train.output_dir, read_settings(cfg)
    resumed = resume and bool(checkpoints_in(folder))
    student = build_with_teachers(cfg, resumed)
    if comm.is_main_process():
        warn_unless_exportable(original)
    logger.info("Model:\n%s", student)
    cfg.optimizer.params.model = student
    with as_setting_error("optimizer"):
        optimizer = instantiate(cfg.optimizer)
    loader = build_train_loader(cfg)
    if unlabeled_batch(cfg) and takes_unlabeled(student):
        add_unlabeled(cfg, loader)
    with as_setting_error("train.ddp"):
        model = create_ddp_model(student, **cfg.train.ddp)
    skip = settings.skip_nonfinite_steps
    trainer: Any = build_step_trainer(
        model, loader, optimizer, amp=cfg.train.amp.enabled, skip=skip
    )
    run = describe_run(original, student)
    key = "train.init_checkpoint"
    checkpointer = RunCheckpointer(model, folder, key=key, run=run, trainer=trainer)
    with as_setting_error("lr_multiplier"):
        scheduler = instantiate(cfg.lr_multiplier)
    results: Dict[str, Any] = {}

    def test() -> Dict[str, Any]:
        results.update(test_model(cfg, model))
        return results

    exporting = build_export(original, student, checkpointer)
    with as_config_error("train.checkpointer", TypeError):  # it names an unknown argument
        checkpoints = hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
    trainer.register_hooks(
        build_hooks(
            model=student,
            clipped=False,  # a step of Detectron2's LazyConfig does not clip
            loader=loader,
            checkpointer=checkpointer,
            scheduler=scheduler,
            checkpoints=checkpoints,
            export=exporting,
            test=test,
            read_metrics=trainer.read_metrics,
            eval_period=cfg.train.eval_period,
            build_writers=lambda: default_writers(folder, cfg.train.max_iter),
            log_period=cfg.train.log_period,
            pictures=build_pictures(
                student, names_of(cfg, "TEST"), lambda: instantiate(cfg.dataloader.test).dataset
            ),
        )
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    check_classes(student, datasets_of(cfg, "TRAIN", "TEST"))
    prepare(student, loader, settings, resumed=resumed)
    if not resume:
        checkpointer.move_earlier_run()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
    exporting.raise_failure()
    return results


def build_model(cfg) -> Any:
    """The model of a LazyConfig on its device.

    Raises:
        ConfigError: an argument is unknown or out of its range.
    """
    with as_setting_error("model"):
        return instantiate(cfg.model).to(cfg.train.device)


def build_with_teachers(cfg, resumed: bool = False) -> Any:
    """The model of a LazyConfig with its teachers.

    Args:
        cfg (DictConfig): the config.
        resumed (bool): the weights will come from a checkpoint of the run.
    """
    loaded = resumed or setting(cfg, "weights")
    model = build_model(without_pretraining(cfg) if loaded else cfg)
    check_image_format(cfg, model, "train", "test", "unlabeled")
    build_teachers(model, training_classes(cfg))
    return model


def build_train_loader(cfg) -> Any:
    """The training data. A ResumableLoader takes the place of Detectron2's own loader."""
    node = cfg.dataloader.train
    if target_of(node) is build_detection_train_loader:
        node._target_, node.worker_init_fn = ResumableLoader, ignore_cluster_signals
    with as_setting_error("dataloader.train"):
        return instantiate(node)


def add_unlabeled(cfg, loader: Any) -> None:
    """Adds the stream of `dataloader.unlabeled`, in which labels are ignored, to the training data.

    Raises:
        ConfigError: one of the two is not the call of Detectron2's own loader.
    """
    node, train_node = cfg.dataloader.unlabeled, cfg.dataloader.train
    own = target_of(node) is build_detection_train_loader and isinstance(loader, ResumableLoader)
    if not own:
        raise ConfigError(
            "dataloader.unlabeled: it and dataloader.train must be calls of Detectron2's "
            "build_detection_train_loader. A loader of your own gives records without "
            '"instances" among the others'
        )
    node._target_, node.worker_init_fn, node.labels = ResumableLoader, ignore_cluster_signals, False
    node.skip_bad_images = node.get("skip_bad_images", train_node.get("skip_bad_images", False))
    with as_setting_error("dataloader.unlabeled"):
        loader.unlabeled = instantiate(node)
    logger.info("%d images without labels", len(loader.unlabeled.dataset))


def check_image_format(cfg, model: Any, *splits: str) -> None:
    """Raises ConfigError unless the mappers and the student have the same image format.

    Args:
        cfg (DictConfig): has a mapper for each split; a mapper without a format passes.
        model (nn.Module): a student; any other model passes.
        splits (str): "train", "test", "unlabeled".
    """
    for split in splits if isinstance(model, DistillMixin) else ():
        key = f"dataloader.{split}.mapper.image_format"
        expected = image_format_of(model)
        found = OmegaConf.select(cfg, key) or expected
        if found != expected:
            raise ConfigError(
                f"{key} is {found} and the student takes {expected} (model.input_format, or "
                "model.image_format of a detector without it): make them equal"
            )


@naming_lazy_fields()
def evaluate(cfg, resume: bool) -> Dict[str, Any]:
    """Evaluates `train.init_checkpoint` (or the last checkpoint); no teacher is built."""
    cfg = for_inference(cfg)
    model = build_model(cfg)
    check_image_format(cfg, model, "test")
    check_classes(model, datasets_of(cfg, "TEST"))
    key = "train.init_checkpoint"
    checkpointer = RunCheckpointer(model, cfg.train.output_dir, key=key, require_all=True)
    loaded = checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    check_trained_order(categories_in(loaded), datasets_of(cfg, "TEST"))
    return test_model(cfg, model)


def test_model(cfg, model: nn.Module) -> Dict[str, Any]:
    """Evaluates by `cfg.dataloader`. The random state of a training stays as it is."""
    cfg = copy.deepcopy(cfg)
    evaluated = "evaluator" in cfg.dataloader and cfg.dataloader.get("test")
    if not evaluated or setting(cfg, "TEST") in ([], ""):
        return {}
    folder = os.path.join(cfg.train.output_dir, "inference")
    with preserve_random_state():
        with as_setting_error("dataloader.test or dataloader.evaluator"):
            node = cfg.dataloader.test
            if "mapper" in node:
                node.mapper = NamingMapper(instantiate(node.mapper))
            loader = instantiate(node)
            evaluator = build_lazy_evaluator(cfg.dataloader.evaluator, folder)
        if isinstance(loader, DataLoader):
            loader.worker_init_fn = ignore_cluster_signals
        results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    save_results(results, cfg.train.output_dir)
    return results
