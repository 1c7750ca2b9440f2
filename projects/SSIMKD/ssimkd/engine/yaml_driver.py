"""Training and evaluation of a YAML config.

Detectron2's DefaultTrainer and its hooks do the work; what is added is a teacher that is there
before the data, a stream of data that can be resumed, and the export of the student.
"""

import logging
from typing import Any, Dict

from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data.build import _train_loader_from_config
from detectron2.engine import DefaultTrainer, hooks
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm

from ssimkd.checkpoint.export import export_student
from ssimkd.checkpoint.run_checkpointer import RunCheckpointer
from ssimkd.data.bad_images import CountSkipped, NamingMapper
from ssimkd.data.datasets import check_classes
from ssimkd.data.resumable_loader import ResumableLoader
from ssimkd.errors import as_config_error, as_output_error, building
from ssimkd.evaluation.evaluators import build_evaluator, save_results
from ssimkd.modeling.student import build_teacher, check_distils, steps_to_skip, unwrap
from ssimkd.utils.random_state import preserve_random_state

from .finite_steps import FiniteSteps
from .hooks import CallAfterTraining, EvalHook, ExactResume
from .preemption import StopOnSignal, ignore_cluster_signals
from .preflight import prepare
from .run_record import describe_run
from .tensorboard_images import build_pictures
from .writers import build_writers

logger = logging.getLogger(__name__)


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
        options["worker_init_fn"] = ignore_cluster_signals
        return ResumableLoader(parts["dataset"], **options)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        """Detectron2's; it names an image that it cannot read, and outlives a job's signals."""
        with building(f"DATASETS.TEST: {dataset_name}"):
            mapper = NamingMapper(DatasetMapper(cfg, is_train=False))
            loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        loader.worker_init_fn = ignore_cluster_signals
        return loader

    @classmethod
    def build_optimizer(cls, cfg, model):
        """Detectron2's; a failure names SOLVER."""
        with building("SOLVER"):
            return super().build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        """Detectron2's; a failure names SOLVER."""
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
        with as_config_error("--resume" if resumed else "MODEL.WEIGHTS"):
            super().resume_or_load(resume=resume)
        model = unwrap(self.model)
        data = self.cfg.DATASETS
        check_classes(model, {"DATASETS.TRAIN": data.TRAIN, "DATASETS.TEST": data.TEST})
        prepare(model, self.data_loader, resumed=resumed)

    def build_hooks(self):
        """Detectron2's hooks, the state for an exact resume, and the export at the end."""
        model, period = unwrap(self.model), self.cfg.SOLVER.CHECKPOINT_PERIOD
        # before the hook that saves takes Detectron2's own
        self.checkpointer = RunCheckpointer(
            self.checkpointer.model,
            self.cfg.OUTPUT_DIR,
            run=describe_run(self.cfg, model),
            **self.checkpointer.checkpointables,
        )
        ret = super().build_hooks()
        exact = ExactResume(self.data_loader, model, period)
        self.exporting = CallAfterTraining(self.export)
        saving = (hooks.PeriodicCheckpointer, hooks.EvalHook)
        place = next(i for i, hook in enumerate(ret) if isinstance(hook, saving))
        tests = self.cfg.DATASETS.TEST
        ret.insert(place, exact)
        # the export before the last evaluation: a failure there must not cost the student
        place = next(i for i, hook in enumerate(ret) if isinstance(hook, hooks.EvalHook))
        ret[place] = EvalHook(self.cfg.TEST.EVAL_PERIOD, ret[place]._func)
        ret[place:place] = [
            self.exporting,
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
        """Completes the checkpoints and writes the student for stock Detectron2."""
        folder = self.cfg.OUTPUT_DIR
        with as_output_error(f"write the student to {folder}"):
            self.checkpointer.complete()
            export_student(self.cfg, unwrap(self.model).state_dict(), folder)

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
        trainer.checkpointer.move_earlier_checkpoints()
    trainer.train()
    trainer.exporting.raise_failure()
    return getattr(trainer, "_last_eval_results", {})


def evaluate(cfg, resume: bool) -> Dict[str, Any]:
    """Evaluates `MODEL.WEIGHTS` (or the last checkpoint) of a YAML config; no teacher is built."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DISTILL.LOSSES = ()
    with building("MODEL"):
        model = build_model(cfg)
    check_classes(model, {"DATASETS.TEST": cfg.DATASETS.TEST})
    checkpointer = RunCheckpointer(model, cfg.OUTPUT_DIR, whole=True)
    with as_config_error(
        "--resume" if resume and checkpointer.has_checkpoint() else "MODEL.WEIGHTS"
    ):
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = DistillTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
