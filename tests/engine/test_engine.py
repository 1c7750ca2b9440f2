"""Both drivers on the Shapes data, through the command line: steps, resume, export."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, narrow_opts, save_teacher, shapes_cfg, zoo_cfg
from detectron2.engine import TrainerBase
from detectron2.modeling import build_model
from ssimkd import ConfigError
from ssimkd.engine.hooks import CallAfterTraining, EvalHook
from ssimkd.engine.yaml_driver import DistillTrainer

KEY = "MODEL.DISTILL"


@pytest.fixture(scope="module", autouse=True)
def few_images(few_shapes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", few_shapes)
        yield


def train_net(*args, check=True, **env):
    """Runs the entry point as a user does."""
    command = [sys.executable, "train_net.py", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}  # one thread: sums in one order
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def yaml_run(out, teacher, *opts, flags=()):
    return train_net(
        "--config-file", "configs/shapes/ssimkd.yaml", *flags,
        f"{KEY}.TEACHER.WEIGHTS", teacher, f"{KEY}.ADAPTER", "conv1x1",
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1,
        "DATALOADER.NUM_WORKERS", 2, "MODEL.RPN.POST_NMS_TOPK_TEST", 5,
        "TEST.EVAL_PERIOD", 2, "OUTPUT_DIR", out, *opts,
    )  # fmt: skip


def lazy_run(out, teacher, *opts, flags=()):
    return train_net(
        "--config-file", "configs/ssimkd_R50.py", *flags,
        "model.distiller.teacher.config=configs/shapes/teacher.yaml",
        f"model.distiller.teacher.weights={teacher}", "model.distiller.adapter=conv1x1",
        "model.roi_heads.num_classes=4", "optimizer.lr=1e-6", "train.init_checkpoint=",
        "dataloader.train.dataset.names=ssimkd_shapes_train",
        "dataloader.test.dataset.names=ssimkd_shapes_val",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64,96]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=32",
        "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=2",
        "dataloader.test.num_workers=0",
        "model.proposal_generator.post_nms_topk=[50,5]", "train.max_iter=4",
        "train.checkpointer.period=1", "train.device=cpu", "+train.seed=1",
        f"train.output_dir={out}", *opts,
    )  # fmt: skip


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def final(out):
    return weights(out / "model_final.pth")


@pytest.fixture(scope="module", params=[yaml_run, lazy_run])
def trained(request, tmp_path_factory, teacher_file):
    """A run of four iterations with either driver."""
    out = tmp_path_factory.mktemp(request.param.__name__)
    done = request.param(out, teacher_file)
    return request.param, out, done


def test_it_trains_evaluates_and_logs_each_level(trained):
    _, out, done = trained
    assert "ssim_kd_loss" in done.stdout
    logged = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert {"ssim_kd_loss", "ssim_kd/p2", "ssim_kd/p5"} <= set(logged[0])
    assert set(json.loads((out / "results.json").read_text())["bbox"]) >= {"AP", "AP50", "AP75"}


def test_it_says_how_it_was_made(trained):
    _, out, done = trained
    (entry,) = json.loads((out / "run.json").read_text())
    assert entry["command"] == shlex.join(["python", *map(str, done.args[1:])])
    assert entry["started"] <= entry["ended"] and entry["versions"]["torch"]


def test_checkpoints_hold_the_student_and_its_adapters_only(trained):
    _, out, _ = trained
    names = final(out)
    assert {k.split(".")[0] for k in names} == {
        "backbone", "proposal_generator", "roi_heads", "distiller"
    }  # fmt: skip
    assert all(k.startswith("distiller.adapters.") for k in names if k.startswith("distiller."))


@pytest.mark.parametrize("iteration", [0, 1])
def test_resume_is_exact(trained, teacher_file, tmp_path, iteration):
    run, out, _ = trained
    name = f"model_{iteration:07d}.pth"
    shutil.copy(out / name, tmp_path)
    (tmp_path / "last_checkpoint").write_text(name)
    # Neither another number of workers changes anything, nor the evaluation (after iteration 1)
    # that the first run did between this checkpoint and its next step.
    workers = {
        yaml_run: ("DATALOADER.NUM_WORKERS", 0),
        lazy_run: ("dataloader.train.num_workers=0",),
    }
    run(tmp_path, teacher_file, *workers[run], flags=["--resume"])
    expected, found = final(out), final(tmp_path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    full, again = (torch.load(folder / "model_final.pth") for folder in (out, tmp_path))
    assert again["iteration"] == full["iteration"] == 3
    optimizers = [
        checkpoint["trainer"].get("_trainer", checkpoint["trainer"])["optimizer"]
        for checkpoint in (full, again)
    ]
    for slot, state in optimizers[0]["state"].items():
        assert torch.equal(
            state["momentum_buffer"], optimizers[1]["state"][slot]["momentum_buffer"]
        )


PLAIN = """
import sys
import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine import DefaultPredictor

class Strict(DetectionCheckpointer):
    def _log_incompatible_keys(self, incompatible):
        assert not any(incompatible), incompatible

path = sys.argv[1]
if sys.argv[2] == "yaml":
    cfg = get_cfg()
    cfg.merge_from_file(path)  # an unknown key would raise
    predictor = DefaultPredictor(cfg)
    Strict(predictor.model).load(cfg.MODEL.WEIGHTS)
    predictor(np.zeros((96, 96, 3), np.uint8))
    model = predictor.model
else:
    cfg = LazyConfig.load(path)
    model = instantiate(cfg.model)
    Strict(model).load(cfg.train.init_checkpoint)
assert type(model).__name__ == "GeneralizedRCNN"
assert not any(name.startswith("ssimkd") for name in sys.modules)
print("loaded")
"""


def test_the_exported_student_loads_in_plain_detectron2(trained):
    run, out, _ = trained
    kind = "yaml" if run is yaml_run else "lazy"
    command = [sys.executable, "-c", PLAIN, str(out / "student.yaml"), kind]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.stdout.endswith("loaded\n"), done.stderr[-2000:]
    trained_weights = final(out)
    exported = weights(out / "student.pth")
    assert not any(name.startswith("distiller.") for name in exported)
    assert all(torch.equal(value, trained_weights[name]) for name, value in exported.items())


def test_the_export_tool_does_the_same_for_any_checkpoint(trained, tmp_path):
    run, out, _ = trained
    config = "configs/shapes/ssimkd.yaml" if run is yaml_run else "configs/ssimkd_R50.py"
    opts = [] if run is yaml_run else ["model.roi_heads.num_classes=4"]
    checkpoint = str(out / "model_0000001.pth")
    command = [sys.executable, "-m", "ssimkd.commands.main", "export", "--config-file", config]
    command += ["--weights", checkpoint, "--out", str(tmp_path), *opts]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    expected = {k: v for k, v in weights(checkpoint).items() if not k.startswith("distiller.")}
    found = weights(tmp_path / "student.pth")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_export_tool_refuses_a_checkpoint_of_another_model(trained, tmp_path):
    _, out, _ = trained
    command = [
        sys.executable,
        "-m",
        "ssimkd.commands.main",
        "export",
        "--weights",
        str(out / "student.pth"),
    ]
    command += ["--config-file", "configs/vanilla_R50.yaml", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not os.listdir(tmp_path)
    assert done.stderr.splitlines()[-1].startswith(
        "error: the checkpoint is not one of this config"
    )


def test_evaluation_needs_no_teacher(trained, tmp_path):
    run, out, _ = trained
    checkpoint, nowhere = out / "model_final.pth", "no/such/teacher"
    if run is yaml_run:
        opts = ["MODEL.WEIGHTS", checkpoint, f"{KEY}.TEACHER.CONFIG", nowhere]
    else:
        opts = [f"train.init_checkpoint={checkpoint}", f"model.distiller.teacher.config={nowhere}"]
    run(tmp_path, nowhere, *opts, flags=["--eval-only"])
    expected = json.loads((out / "results.json").read_text())
    assert json.loads((tmp_path / "results.json").read_text()) == expected


def test_a_checkpoint_of_detectron2_without_optimizer_state_still_resumes(teacher_file, tmp_path):
    """v0.5 and v0.6 write such ones."""
    cfg = shapes_cfg("vanilla", "OUTPUT_DIR", str(tmp_path))
    trainer = DistillTrainer(cfg)
    trainer.load_state_dict({"iteration": 7})
    assert trainer.iter == 7


def test_a_retinanet_resumes_exactly_with_its_running_normalizer(tmp_path):
    """Detectron2 keeps the number of foreground anchors outside the checkpoint."""
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    teacher = save_teacher(zoo_cfg(name, "MODEL.RETINANET.NUM_CLASSES", 4), tmp_path / "t.pth")
    cfg = zoo_cfg(
        name, "MODEL.META_ARCHITECTURE", "DistillRetinaNet", "MODEL.RETINANET.NUM_CLASSES", 4,
        "MODEL.WEIGHTS", "", "DATASETS.TRAIN", ("ssimkd_shapes_train",), "DATASETS.TEST", (),
        f"{KEY}.TEACHER.CONFIG", name, f"{KEY}.TEACHER.WEIGHTS", teacher,
        f"{KEY}.TEACHER.OPTS", [*narrow_opts(name), "MODEL.RETINANET.NUM_CLASSES", 4],
        f"{KEY}.IN_FEATURES", ["p3", "p5", "p7"], f"{KEY}.INHERIT", ["head"],
        "INPUT.MIN_SIZE_TRAIN", (64, 96), "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 3,
        "SOLVER.CHECKPOINT_PERIOD", 1, "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
    )  # fmt: skip

    def run(folder, resume):
        torch.manual_seed(1)
        np.random.seed(1)
        cfg.OUTPUT_DIR = str(folder)
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        head = {k: v.clone() for k, v in trainer.model.head.state_dict().items()}
        trainer.train()
        return head, trainer.model.loss_normalizer

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    head, normalizer = run(tmp_path / "a", resume=False)
    inherited = weights(teacher)
    assert all(torch.equal(value, inherited[f"head.{k}"]) for k, value in head.items())
    shutil.copy(tmp_path / "a" / "model_0000000.pth", tmp_path / "b")
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000000.pth")
    head, again = run(tmp_path / "b", resume=True)
    assert not all(torch.equal(value, inherited[f"head.{k}"]) for k, value in head.items())
    assert again == normalizer != 100  # where Detectron2 starts it
    expected, found = final(tmp_path / "a"), final(tmp_path / "b")
    assert all(torch.equal(found[k], value) for k, value in expected.items())


class Trainer:
    """What the hooks look at."""

    max_iter = 4

    def __init__(self, iteration, start_iter=0):
        self.iter, self.start_iter = iteration, start_iter


def test_a_run_that_failed_in_its_last_iteration_exports_nothing():
    called = []
    hook = CallAfterTraining(lambda: called.append(1))
    for iteration, expected in ((3, []), (4, [1])):  # 4: counted up after the last step
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


def test_a_run_that_failed_in_its_last_iteration_is_not_evaluated(tmp_path):
    trainer = DistillTrainer(shapes_cfg("vanilla", "OUTPUT_DIR", str(tmp_path)))
    hook = next(hook for hook in trainer._hooks if isinstance(hook, EvalHook))
    called = []
    hook._do_eval = lambda: called.append(1)
    for iteration, expected in ((3, []), (4, [1])):
        hook.trainer = Trainer(iteration)
        hook.after_train()
        assert called == expected


def test_a_resume_that_is_not_exact_says_so(caplog):
    from ssimkd.engine.hooks import ExactResume

    hook = ExactResume([], torch.nn.Module(), 10)
    hook.trainer = Trainer(3, start_iter=3)
    hook.before_train()
    hook.load_state_dict({"random": [{}, {}]})
    hook.before_train()
    messages = [record.message for record in caplog.records]
    assert len(messages) == 3 and all("not exact" in message for message in messages)


def test_a_plain_detector_with_a_teacher_is_refused():
    cfg = shapes_cfg("ssimkd", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    with pytest.raises(ConfigError, match="GeneralizedRCNN does not distil; set DistillRCNN"):
        DistillTrainer.build_model(cfg)
    cfg.MODEL.DISTILL.LOSSES = ()
    DistillTrainer.build_model(cfg)


def test_the_student_is_exported_before_the_last_evaluation(tmp_path):
    trainer = DistillTrainer(shapes_cfg("vanilla", "OUTPUT_DIR", str(tmp_path)))
    kinds = [type(hook) for hook in trainer._hooks]
    assert kinds.index(CallAfterTraining) < kinds.index(EvalHook)


def test_the_teachers_failure_comes_before_the_first_iteration(teacher_file, tmp_path):
    state = torch.load(teacher_file)["model"]
    del state["backbone.fpn_output2.weight"]
    torch.save({"model": state}, tmp_path / "teacher.pth")
    done = train_net(
        "--config-file", "configs/shapes/ssimkd.yaml", "OUTPUT_DIR", tmp_path / "out",
        f"{KEY}.TEACHER.WEIGHTS", tmp_path / "teacher.pth", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Starting training" not in done.stdout and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {KEY}.TEACHER.WEIGHTS: ") and "fpn_output2.weight" in last


def test_the_kept_teacher_is_as_good_as_the_readme_says(tmp_path):
    weights_file = "configs/shapes/teacher.pth"
    assert os.path.getsize(ROOT / weights_file) <= 4_000_000  # bytes
    train_net(
        "--config-file", "configs/shapes/teacher.yaml", "--eval-only",
        "MODEL.WEIGHTS", weights_file, "OUTPUT_DIR", tmp_path, DETECTRON2_DATASETS="datasets",
    )  # fmt: skip
    found = json.loads((tmp_path / "results.json").read_text())["bbox"]["AP"]
    readme = (ROOT / "README.md").read_text().splitlines()
    (line,) = [row for row in readme if row.startswith("| teacher |")]
    claimed = float(line.split("|")[2])
    # libraries of another version decode and round a little differently
    assert found == pytest.approx(claimed, abs=0.5)


def test_the_kept_teacher_is_its_config(tmp_path):
    model = build_model(shapes_cfg("teacher"))
    assert model.state_dict().keys() == weights(ROOT / "configs/shapes/teacher.pth").keys()
