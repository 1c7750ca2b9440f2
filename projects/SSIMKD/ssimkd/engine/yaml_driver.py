"""Training and evaluation of a YAML config.

Detectron2's DefaultTrainer does the work. This file adds a teacher that is built before the data is
read, a stream of data that can be resumed, and the export of the student.
"""

import logging
import weakref
from typing import Any, Dict

from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.data.build import _train_loader_from_config
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules

from ssimkd.checkpoint.export import plain_config
from ssimkd.checkpoint.reader import categories_in
from ssimkd.checkpoint.run_checkpointer import RunCheckpointer, checkpoints_in
from ssimkd.data.bad_images import NamingMapper
from ssimkd.data.datasets import (
    build_mapper,
    check_classes,
    check_trained_order,
    training_classes,
)
from ssimkd.data.resumable_loader import ResumableLoader
from ssimkd.errors import ConfigError, as_setting_error
from ssimkd.evaluation.evaluators import build_evaluator, save_results
from ssimkd.modeling.meta_arch import DistillMixin
from ssimkd.modeling.several_teachers import build_teachers, takes_unlabeled
from ssimkd.utils.compat import create_ddp_model, unwrap
from ssimkd.utils.config_keys import (
    datasets_of,
    for_inference,
    unlabeled_batch,
    without_pretraining,
)
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
LOG_PERIOD = 20  # iterations; DefaultTrainer has the same number


class DistillTrainer(DefaultTrainer):
    """Detectron2's trainer of a YAML config, for students and plain detectors alike.

    Args:
        cfg (CfgNode): with `MODEL.DISTILL`.
        resume (bool): the weights will be those of a checkpoint in the folder, if it has one.
    """

    def __init__(self, cfg, resume: bool = False) -> None:
        # DefaultTrainer's constructor would build another trainer of steps and checkpointer
        TrainerBase.__init__(self)
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.settings = read_settings(cfg)
        resumed = resume and checkpoints_in(cfg.OUTPUT_DIR)
        model = self.build_model(without_pretraining(cfg) if resumed else cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        if unlabeled_batch(cfg) and takes_unlabeled(model):
            loader.unlabeled = self.build_unlabeled_loader(cfg)
        model = create_ddp_model(model, broadcast_buffers=False)
        skip = self.settings.skip_nonfinite_steps
        self._trainer = build_step_trainer(
            model, loader, optimizer, amp=cfg.SOLVER.AMP.ENABLED, skip=skip
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        run = describe_run(cfg, unwrap(model))
        self.checkpointer = RunCheckpointer(
            model, cfg.OUTPUT_DIR, key="MODEL.WEIGHTS", run=run, trainer=weakref.proxy(self)
        )
        self.exporting = build_export(cfg, unwrap(model), self.checkpointer)
        self.register_hooks(self.build_hooks())

    @staticmethod
    def auto_scale_workers(cfg, num_workers: int):
        """Detectron2's, which here scales this project's images and iterations as well.

        Raises:
            ConfigError: the images of the reference cannot be shared by its processes.
        """
        with as_setting_error("SOLVER.REFERENCE_WORLD_SIZE"):
            scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:
            reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
            images, left = divmod(unlabeled_batch(cfg), reference)
            if left:
                raise ConfigError(
                    "SOLVER.IMS_PER_BATCH_UNLABELED must be a multiple of "
                    f"SOLVER.REFERENCE_WORLD_SIZE, which is {reference}"
                )
            scaled.defrost()
            scaled.SOLVER.IMS_PER_BATCH_UNLABELED = images * num_workers
            for key in ("WARMUP_ITERS", "COOLDOWN_ITERS", "STOP_ITER"):
                scaled.MODEL.DISTILL[key] = round(cfg.MODEL.DISTILL[key] * reference / num_workers)
            if cfg.is_frozen():
                scaled.freeze()
        return scaled

    @classmethod
    def build_model(cls, cfg):
        """The model, with its teacher.

        Raises:
            ConfigError: a teacher is named, and the meta-architecture does not distil.
        """
        with as_setting_error("MODEL"):
            model = super().build_model(cfg)
        node = cfg.MODEL.DISTILL
        named = (node.TEACHER.CONFIG or node.TEACHERS) and node.LOSSES
        if named and not isinstance(model, DistillMixin):
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE: {type(model).__name__} does not distil; set "
                "DistillRCNN, DistillRetinaNet or DistillPanopticFPN, or MODEL.DISTILL.LOSSES to ()"
            )
        build_teachers(model, training_classes(cfg))
        return model

    @classmethod
    def build_train_loader(cls, cfg):
        """Detectron2's data set, sampler and mapper, in a stream that can be resumed."""
        with as_setting_error("DATASETS, DATALOADER or INPUT"):
            return build_stream(cfg, _train_loader_from_config(cfg, build_mapper(cfg, True)))

    @classmethod
    def build_unlabeled_loader(cls, cfg):
        """The images of DATASETS.UNLABELED, by the same mapper, in a stream of the same kind."""
        with as_setting_error("DATASETS.UNLABELED, DATALOADER or INPUT"):
            dataset = [x for name in cfg.DATASETS.UNLABELED for x in DatasetCatalog.get(name)]
            logger.info("%d images without labels", len(dataset))
            sampler = TrainingSampler(len(dataset))
            parts = _train_loader_from_config(
                cfg, build_mapper(cfg, True), dataset=dataset, sampler=sampler
            )
            parts["total_batch_size"] = cfg.SOLVER.IMS_PER_BATCH_UNLABELED
            return build_stream(cfg, parts, labels=False)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        """Detectron2's loader, which names an unreadable image and ignores a job's signals here."""
        with as_setting_error(f"DATASETS.TEST: {dataset_name}"):
            mapper = NamingMapper(build_mapper(cfg, False))
            loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        loader.worker_init_fn = ignore_cluster_signals
        return loader

    @classmethod
    def build_optimizer(cls, cfg, model):
        """Detectron2's optimizer. An error names the key SOLVER."""
        with as_setting_error("SOLVER"):
            return super().build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        """Detectron2's scheduler. An error names the key SOLVER."""
        with as_setting_error("SOLVER"):
            return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        """Evaluates by the data set's own metrics; detections are written to `inference/`."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Evaluates. The random state of a training stays as it is."""
        if cfg.TEST.AUG.ENABLED and cfg.DATASETS.TEST:
            logger.warning(
                "TEST.AUG.ENABLED: this evaluation is without test-time augmentation. Detectron2's "
                "tools/train_net.py has it; give it student.yaml"
            )
        with preserve_random_state():
            results = super().test(cfg, model, evaluators)
        save_results(results, cfg.OUTPUT_DIR)
        return results

    def build_hooks(self):
        """The hooks of `hooks.py` for this config."""
        cfg, model, tests = self.cfg, unwrap(self.model), self.cfg.DATASETS.TEST

        def test() -> Dict[str, Any]:
            self._last_eval_results = self.test(cfg, self.model)
            return self._last_eval_results

        return build_hooks(
            model=model,
            clipped=cfg.SOLVER.CLIP_GRADIENTS.ENABLED,
            loader=self.data_loader,
            checkpointer=self.checkpointer,
            scheduler=self.scheduler,
            checkpoints=hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
            export=self.exporting,
            test=test,
            read_metrics=self._trainer.read_metrics,
            eval_period=cfg.TEST.EVAL_PERIOD,
            build_writers=self.build_writers,
            log_period=LOG_PERIOD,
            pictures=build_pictures(
                model, tests, lambda: self.build_test_loader(cfg, tests[0]).dataset
            ),
            precise_bn=self.build_precise_bn(),
        )

    def build_precise_bn(self):
        """Detectron2's hook for TEST.PRECISE_BN, with its own stream of data; None if it is off."""
        if not (self.cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model)):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        loader = self.build_train_loader(cfg)
        number = cfg.TEST.PRECISE_BN.NUM_ITER
        return PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, number)

    def resume_or_load(self, resume=True):
        """Loads the weights, then what the student inherits, and checks the pair."""
        resumed = resume and self.checkpointer.has_checkpoint()
        super().resume_or_load(resume=resume)
        model = unwrap(self.model)
        check_classes(model, datasets_of(self.cfg, "TRAIN", "TEST"))
        prepare(model, self.data_loader, self.settings, resumed=resumed)

    def state_dict(self):
        """Adds the optimizer and loss scale, which Detectron2 up to v0.6 leaves out."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        """Takes a checkpoint of any Detectron2. Without an optimizer, the resume is not exact."""
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint holds no optimizer state: this resume is not exact")
            state_dict = {**state_dict, "_trainer": self._trainer.state_dict()}
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])


class PreciseBN(hooks.PreciseBN):
    """Detectron2's hook, without the distillation: statistics of the student need no teacher."""

    def update_stats(self) -> None:
        """Called by Detectron2."""
        student: Any = unwrap(self._model)
        distiller = getattr(student, "distiller", None)
        if distiller is not None:
            student.distiller = None
        try:
            super().update_stats()
        finally:
            if distiller is not None:
                student.distiller = distiller


def build_stream(cfg, parts: Dict[str, Any], **options: Any) -> ResumableLoader:
    """The stream of what Detectron2 has prepared for its own loader.

    Args:
        cfg (CfgNode): the config.
        parts (dict): the arguments of Detectron2's `build_detection_train_loader`.
        options: further arguments of :class:`ResumableLoader`.
    """
    names = ("mapper", "sampler", "total_batch_size", "aspect_ratio_grouping", "num_workers")
    return ResumableLoader(
        parts["dataset"],
        **{name: parts[name] for name in names},
        skip_bad_images=cfg.DATALOADER.SKIP_BAD_IMAGES,
        worker_init_fn=ignore_cluster_signals,
        **options,
    )


def build_with_teachers(cfg) -> Any:
    """The model of a YAML config with its teachers."""
    return DistillTrainer.build_model(cfg)


def train(cfg, resume: bool) -> Dict[str, Any]:
    """Trains a YAML config.

    Args:
        cfg (CfgNode): the config, with `MODEL.DISTILL`.
        resume (bool): go on from the last checkpoint in `cfg.OUTPUT_DIR`.

    Returns:
        dict: metrics of the last evaluation, on the main process.
    """
    plain_config(cfg, "")  # an error comes now, and not when the student is exported
    with wandb_run(cfg.MODEL.DISTILL.WANDB_PROJECT, cfg.OUTPUT_DIR):
        trainer = DistillTrainer(cfg, resume)
        trainer.resume_or_load(resume=resume)
        if not resume:
            trainer.checkpointer.move_earlier_run()
        trainer.train()
    trainer.exporting.raise_failure()
    return getattr(trainer, "_last_eval_results", {})


def evaluate(cfg, resume: bool) -> Dict[str, Any]:
    """Evaluates `MODEL.WEIGHTS` (or the last checkpoint) of a YAML config; no teacher is built."""
    cfg = for_inference(cfg)
    with as_setting_error("MODEL"):
        model = build_model(cfg)
    check_classes(model, datasets_of(cfg, "TEST"))
    checkpointer = RunCheckpointer(model, cfg.OUTPUT_DIR, key="MODEL.WEIGHTS", require_all=True)
    loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    check_trained_order(categories_in(loaded), datasets_of(cfg, "TEST"))
    results = DistillTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
