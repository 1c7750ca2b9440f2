"""Training and evaluation with both of Detectron2's config systems.

Detectron2's DefaultTrainer and its hooks do the work; what is added is a teacher that is there
before the data, a stream of data that can be resumed, and the export of the student.
"""

import copy
import json
import logging
import math
import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator

from detectron2.config import instantiate
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data.build import _train_loader_from_config, build_detection_train_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    hooks,
)
from detectron2.evaluation import (
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.modeling import build_model
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .bad_images import CountSkipped, NamingMapper
from .checkpointer import WholeCheckpointer, whole_file
from .compat import create_ddp_model
from .data import check_classes
from .errors import ConfigError, one_line
from .evaluation import build_evaluator, build_lazy_evaluator
from .export import export_student
from .finite import FiniteSteps
from .hooks import AfterTraining, EvalHook, ExactResume
from .lazy import lazy_names, target_of
from .loader import ResumableLoader
from .meta_arch import DistillMixin
from .pictures import build_pictures
from .preemption import StopOnSignal, leave_to_parent
from .preflight import distillers_of, prepare
from .random_state import preserve_random_state
from .same_run import describe_run
from .writers import build_writers

logger = logging.getLogger(__name__)


def build_teacher(model: nn.Module) -> None:
    """Builds a student's teacher now, so that its failures come before the data is read."""
    if isinstance(model, DistillMixin) and model.distiller is not None:
        model.distiller.build_teacher(model.device)


def check_distils(model: nn.Module) -> None:
    """Raises ConfigError for a plain detector, which would ignore its teacher."""
    if not isinstance(model, DistillMixin):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE: {type(model).__name__} does not distil; set DistillRCNN, "
            "DistillRetinaNet or DistillPanopticFPN, or MODEL.DISTILL.LOSSES to ()"
        )


@contextmanager
def loading(key: str) -> Iterator[None]:
    """Around the loading of a model: the ConfigError names the key that named the file."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


@contextmanager
def building(what: str) -> Iterator[None]:
    """Around a part of a run that settings describe: its failure is a ConfigError that names them.

    Detectron2 raises anything there: KeyError for an unknown name, AssertionError for a number.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {one_line(error)}") from error


def save_results(results: Dict[str, Any], folder: str) -> None:
    """Writes an evaluation's metrics to `results.json`, on the main process."""
    if comm.is_main_process() and results:
        with whole_file(os.path.join(folder, "results.json"), "w") as f:
            json.dump(without_nan(results), f, indent=2)


def steps_to_skip(model: nn.Module) -> int:
    """How many steps with NaN or infinity a run may leave out."""
    return max((distiller.skip_nonfinite_steps for _, distiller in distillers_of(model)), default=0)


def without_nan(value: Any) -> Any:
    """Nested metrics with None for NaN, which JSON does not know (no object of a size, say)."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


class DistillTrainer(DefaultTrainer):
    """Detectron2's trainer of a YAML config, for students and plain detectors alike."""

    @classmethod
    def build_model(cls, cfg):
        """The model, with its teacher.

        Raises:
            ConfigError: a teacher is named, and the meta-architecture does not distil.
        """
        with building("MODEL"):
            model = super().build_model(cfg)
        node = cfg.MODEL.DISTILL
        if (node.TEACHER.CONFIG or node.TEACHERS) and node.LOSSES:
            check_distils(model)
        build_teacher(model)
        return model

    @classmethod
    def build_train_loader(cls, cfg):
        """Detectron2's data, sampler and mapper in a stream that can be resumed."""
        with building("DATASETS, DATALOADER or INPUT"):
            parts = _train_loader_from_config(cfg)
        names = ("mapper", "sampler", "total_batch_size", "aspect_ratio_grouping", "num_workers")
        options = {name: parts[name] for name in names}
        options["skip_bad_images"] = cfg.DATALOADER.SKIP_BAD_IMAGES
        return ResumableLoader(parts["dataset"], **options)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        """Detectron2's; it names an image that it cannot read, and outlives a job's signals."""
        with building(f"DATASETS.TEST: {dataset_name}"):
            mapper = NamingMapper(DatasetMapper(cfg, is_train=False))
            loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        loader.worker_init_fn = leave_to_parent
        return loader

    @classmethod
    def build_optimizer(cls, cfg, model):
        """As Detectron2's."""
        with building("SOLVER"):
            return super().build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        """As Detectron2's."""
        with building("SOLVER"):
            return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        """The data set's own metrics; detections go to `inference/`."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Evaluates, without a trace in the random state of the training around it."""
        with preserve_random_state():
            results = super().test(cfg, model, evaluators)
        save_results(results, cfg.OUTPUT_DIR)
        return results

    def resume_or_load(self, resume=True):
        """Loads the weights, then what the student inherits, and checks the pair."""
        resumed = resume and self.checkpointer.has_checkpoint()
        with loading("--resume" if resumed else "MODEL.WEIGHTS"):
            super().resume_or_load(resume=resume)
        model = unwrap(self.model)
        data = self.cfg.DATASETS
        check_classes(model, {"DATASETS.TRAIN": data.TRAIN, "DATASETS.TEST": data.TEST})
        prepare(model, self.data_loader, resumed=resumed)

    def build_hooks(self):
        """Detectron2's hooks, the state for an exact resume, and the export at the end."""
        model, period = unwrap(self.model), self.cfg.SOLVER.CHECKPOINT_PERIOD
        # before the hook that saves takes Detectron2's own
        self.checkpointer = WholeCheckpointer(
            self.checkpointer.model,
            self.cfg.OUTPUT_DIR,
            run=describe_run(self.cfg, model),
            **self.checkpointer.checkpointables,
        )
        ret = super().build_hooks()
        exact = ExactResume(self.data_loader, model, period)
        saving = (hooks.PeriodicCheckpointer, hooks.EvalHook)
        place = next(i for i, hook in enumerate(ret) if isinstance(hook, saving))
        tests = self.cfg.DATASETS.TEST
        ret.insert(place, exact)
        # the export before the last evaluation: a failure there must not cost the student
        place = next(i for i, hook in enumerate(ret) if isinstance(hook, hooks.EvalHook))
        ret[place] = EvalHook(self.cfg.TEST.EVAL_PERIOD, ret[place]._func)
        ret[place:place] = [
            AfterTraining(self.export),
            StopOnSignal(exact.collect, self.checkpointer),
            CountSkipped(self.data_loader),
            build_pictures(
                model, tests, lambda: self.build_test_loader(self.cfg, tests[0]).dataset
            ),
        ]
        return [FiniteSteps(steps_to_skip(model)), *ret]

    def build_writers(self):
        """Detectron2's, and what a terminal or Weights & Biases shows."""
        cfg = self.cfg
        batch_size, project = cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.DISTILL.WANDB_PROJECT
        return build_writers(cfg.OUTPUT_DIR, self.max_iter, batch_size, project)

    def export(self):
        """Writes the student for stock Detectron2."""
        self.checkpointer.complete()
        export_student(self.cfg, unwrap(self.model).state_dict(), self.cfg.OUTPUT_DIR)

    def state_dict(self):
        """Optimizer and loss scale as well, which Detectron2 before 2022 left out."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        """Takes a checkpoint of any Detectron2; one without optimizer resumes inexactly."""
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint holds no optimizer state: this resume is not exact")
            state_dict = {**state_dict, "_trainer": self._trainer.state_dict()}
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, if it is in one."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def train(cfg, resume: bool) -> Dict[str, Any]:
    """Trains a YAML config.

    Args:
        cfg (CfgNode): with `MODEL.DISTILL`.
        resume (bool): go on from the last checkpoint in `cfg.OUTPUT_DIR`.

    Returns:
        dict: metrics of the last evaluation, on the main process.
    """
    with building("the config"):
        trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    if not resume:
        trainer.checkpointer.set_aside()
    trainer.train()
    return getattr(trainer, "_last_eval_results", {})


def evaluate(cfg, resume: bool) -> Dict[str, Any]:
    """Evaluates `MODEL.WEIGHTS` (or the last checkpoint) of a YAML config; no teacher is built."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DISTILL.LOSSES = ()
    with building("MODEL"):
        model = build_model(cfg)
    check_classes(model, {"DATASETS.TEST": cfg.DATASETS.TEST})
    checkpointer = WholeCheckpointer(model, cfg.OUTPUT_DIR, whole=True)
    with loading("--resume" if resume and checkpointer.has_checkpoint() else "MODEL.WEIGHTS"):
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = DistillTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def lazy_train(cfg, resume: bool) -> Dict[str, Any]:
    """Trains a LazyConfig that has the fields of Detectron2's `tools/lazyconfig_train_net.py`.

    Args:
        cfg (DictConfig): model, optimizer, lr_multiplier, dataloader, train.
        resume (bool): go on from the last checkpoint in `cfg.train.output_dir`.

    Returns:
        dict: metrics of the last evaluation, on the main process.
    """
    original, cfg = cfg, copy.deepcopy(cfg)
    model = lazy_model(cfg)
    logger.info("Model:\n%s", model)
    check_image_format(cfg, model)
    build_teacher(model)
    cfg.optimizer.params.model = model
    with building("optimizer"):
        optimizer = instantiate(cfg.optimizer)
    if target_of(cfg.dataloader.train) is build_detection_train_loader:
        cfg.dataloader.train._target_ = ResumableLoader
    with building("dataloader.train"):
        loader = instantiate(cfg.dataloader.train)
    with building("train.ddp"):
        model = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    run = describe_run(original, unwrap(model))
    checkpointer = WholeCheckpointer(model, cfg.train.output_dir, run=run, trainer=trainer)
    exact = ExactResume(loader, unwrap(model), cfg.train.checkpointer.period)
    results: Dict[str, Any] = {}

    def test() -> Dict[str, Any]:
        results.update(lazy_test(cfg, model))
        return results

    def export() -> None:
        checkpointer.complete()
        export_student(original, unwrap(model).state_dict(), cfg.train.output_dir)

    with building("lr_multiplier"):
        scheduler = instantiate(cfg.lr_multiplier)
    checkpoints = writer = None  # on the main process alone
    if comm.is_main_process():
        with building("train.checkpointer"):
            checkpoints = hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
        batch_size = OmegaConf.select(cfg, "dataloader.train.total_batch_size") or 0
        project = cfg.train.get("wandb_project", "")
        writers = build_writers(cfg.train.output_dir, cfg.train.max_iter, batch_size, project)
        writer = hooks.PeriodicWriter(writers, period=cfg.train.log_period)
    trainer.register_hooks(
        [
            FiniteSteps(steps_to_skip(unwrap(model))),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=scheduler),
            exact,
            checkpoints,
            AfterTraining(export),  # before the last evaluation, whose failure must not cost it
            StopOnSignal(exact.collect, checkpointer),
            CountSkipped(loader),
            EvalHook(cfg.train.eval_period, test),
            build_pictures(
                unwrap(model),
                lazy_names(cfg, "TEST")[0],
                lambda: instantiate(cfg.dataloader.test).dataset,
            ),
            writer,
        ]
    )
    resumed = resume and checkpointer.has_checkpoint()
    with loading("--resume" if resumed else "train.init_checkpoint"):
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    data = {key: names for names, key in (lazy_names(cfg, s) for s in ("TRAIN", "TEST"))}
    check_classes(unwrap(model), data)
    prepare(unwrap(model), loader, resumed=resumed)
    if not resume:
        checkpointer.set_aside()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
    return results


def lazy_model(cfg) -> nn.Module:
    """The model of a LazyConfig on its device.

    Raises:
        ConfigError: an argument is unknown or out of its range.
    """
    with building("model"):
        return instantiate(cfg.model).to(cfg.train.device)


def check_image_format(cfg, model: nn.Module) -> None:
    """Raises ConfigError unless mapper and student agree on the images' channel order.

    A student that does not say which order it takes (FCOS) takes the mapper's.
    """
    key = "dataloader.train.mapper.image_format"
    found, expected = OmegaConf.select(cfg, key), getattr(model, "input_format", None)
    if not (isinstance(model, DistillMixin) and found):
        return
    if expected and found != expected:
        raise ConfigError(f"{key} is {found}, model.input_format {expected}: make them equal")
    model.input_format = found


def lazy_evaluate(cfg, resume: bool) -> Dict[str, Any]:
    """Evaluates `train.init_checkpoint` (or the last checkpoint); no teacher is built."""
    cfg = copy.deepcopy(cfg)
    if "distiller" in cfg.model:
        cfg.model.distiller = None
    model = create_ddp_model(lazy_model(cfg))
    names, key = lazy_names(cfg, "TEST")
    check_classes(unwrap(model), {key: names})
    checkpointer = WholeCheckpointer(model, cfg.train.output_dir, whole=True)
    resumed = resume and checkpointer.has_checkpoint()
    with loading("--resume" if resumed else "train.init_checkpoint"):
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    return lazy_test(cfg, model)


def lazy_test(cfg, model: nn.Module) -> Dict[str, Any]:
    """Evaluates a model by `cfg.dataloader`, without a trace in the random state."""
    cfg = copy.deepcopy(cfg)
    if "evaluator" not in cfg.dataloader or not lazy_names(cfg, "TEST")[0]:
        return {}
    folder = os.path.join(cfg.train.output_dir, "inference")
    with preserve_random_state():
        with building("dataloader.test or dataloader.evaluator"):
            node = cfg.dataloader.test
            node.mapper = NamingMapper(instantiate(node.mapper))
            loader = instantiate(node)
            evaluator = build_lazy_evaluator(cfg.dataloader.evaluator, folder)
        loader.worker_init_fn = leave_to_parent  # as DistillTrainer.build_test_loader
        results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    save_results(results, cfg.train.output_dir)
    return results
