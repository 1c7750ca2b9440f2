"""What both drivers write when they train and evaluate on the Shapes data."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, narrow_opts, save_teacher, shapes_cfg, zoo_cfg
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog
from detectron2.engine import defaults
from detectron2.modeling import build_model
from ssimkd import ConfigError
from ssimkd.engine import lazy_driver, yaml_driver
from ssimkd.engine.arguments import check_config, load_config
from ssimkd.engine.yaml_driver import DistillTrainer
from ssimkd.utils.config_keys import without_pretraining
from ssimkd_cli import parse

KEY = "MODEL.DISTILL"
TEACHER_FILE = "configs/shapes/teacher.pth"


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def test_a_run_trains_evaluates_and_logs_each_level(reference):
    assert "ssim_kd_loss" in reference.log_of(reference.out)
    logged = [json.loads(line) for line in open(reference.out / "metrics.json")]
    assert {"ssim_kd_loss", "ssim_kd/p2", "ssim_kd/p5"} <= set(logged[0])
    assert set(reference.results()["bbox"]) >= {"AP", "AP50", "AP75"}


def test_checkpoints_hold_the_student_and_what_the_distillation_trains(reference):
    names = reference.weights()
    parts = {name.split(".")[0] for name in names}
    assert parts == {"backbone", "proposal_generator", "roi_heads", "distiller"}
    own = {".".join(k.split(".")[:3]) for k in names if k.startswith("distiller.")}
    assert own == {*(f"distiller.adapters.p{i}" for i in range(2, 6)), "distiller.losses.fgd"}


PLAIN = """
import sys
import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor

class Strict(DetectionCheckpointer):
    def _log_incompatible_keys(self, incompatible):
        assert not any(incompatible), incompatible

cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])  # an unknown key would raise
predictor = DefaultPredictor(cfg)
Strict(predictor.model).load(cfg.MODEL.WEIGHTS)
predictor(np.zeros((96, 96, 3), np.uint8))
assert type(predictor.model).__name__ == "GeneralizedRCNN"
assert not any(name.startswith("ssimkd") for name in sys.modules)
"""


def test_the_exported_student_loads_in_plain_detectron2(yaml):
    command = [sys.executable, "-c", PLAIN, str(yaml.out / "student.yaml")]
    done = subprocess.run(command, cwd=yaml.out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_exported_student_has_the_trained_weights_and_no_others(reference):
    exported, trained = weights(reference.out / "student.pth"), reference.weights()
    assert exported.keys() == {k for k in trained if not k.startswith("distiller.")}
    assert all(torch.equal(value, trained[name]) for name, value in exported.items())


@pytest.mark.parametrize("driver", ["yaml", "lazy"])
def test_evaluation_needs_no_teacher(driver, request, tmp_path):
    reference = request.getfixturevalue(driver)
    checkpoint, nowhere = reference.out / "model_final.pth", "no/such/teacher"
    if driver == "yaml":
        opts = ["MODEL.WEIGHTS", checkpoint, f"{KEY}.TEACHER.CONFIG", nowhere]
    else:
        opts = [f"train.init_checkpoint={checkpoint}", f"model.distiller.teacher.config={nowhere}"]
    assert reference.finish(tmp_path, *opts, flags=["--eval-only"]) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == reference.results()


def test_a_checkpoint_of_detectron2_without_optimizer_state_still_resumes(few_images, tmp_path):
    """v0.5 and v0.6 write such ones."""
    trainer = DistillTrainer(shapes_cfg("vanilla", "OUTPUT_DIR", str(tmp_path)))
    trainer.load_state_dict({"iteration": 7})
    assert trainer.iter == 7


def test_importing_and_building_leaves_detectron2_as_it_is(few_images, tmp_path):
    names = ("create_ddp_model", "SimpleTrainer", "AMPTrainer", "DetectionCheckpointer")
    before = {name: getattr(defaults, name) for name in names}
    trainer = DistillTrainer(shapes_cfg("vanilla", "OUTPUT_DIR", str(tmp_path)))
    assert all(before[name].__module__.startswith("detectron2.") for name in names)
    assert {name: getattr(defaults, name) for name in names} == before
    assert trainer._trainer._write_metrics.__self__ is trainer._trainer


def test_a_retinanet_resumes_exactly_with_its_running_normalizer(few_images, tmp_path):
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
    expected, found = (weights(tmp_path / name / "model_final.pth") for name in "ab")
    assert all(torch.equal(found[k], value) for k, value in expected.items())


def test_a_plain_detector_with_a_teacher_is_refused():
    cfg = shapes_cfg("ssimkd", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    with pytest.raises(ConfigError, match="GeneralizedRCNN does not distil; set DistillRCNN"):
        DistillTrainer.build_model(cfg)
    cfg.MODEL.DISTILL.LOSSES = ()
    DistillTrainer.build_model(cfg)


@pytest.mark.parametrize("lazy", [False, True])
def test_an_evaluation_refuses_classes_in_another_order(few_images, tmp_path, lazy):
    path, folder = str(tmp_path / "x.pth"), str(tmp_path)
    if lazy:
        opts = [f"train.output_dir={folder}", f"train.init_checkpoint={path}"]
        cfg = load_config("tests/engine/lazy_shapes.py", opts)
        driver, state = lazy_driver, lazy_driver.build_model(cfg).state_dict()
    else:
        cfg = shapes_cfg("vanilla", "OUTPUT_DIR", folder, "MODEL.WEIGHTS", path)
        driver, state = yaml_driver, build_model(cfg).state_dict()
    state = {name: x for name, x in state.items() if not name.startswith("distiller.")}
    names = ["disk", "triangle", "ring", "cross"]  # the data has the ring before the triangle
    run = {"categories": [{"id": i, "name": name} for i, name in enumerate(names)]}
    torch.save({"model": state, "run": run}, path)
    with pytest.raises(ConfigError, match="has the class 'ring' where the checkpoint was trained"):
        driver.evaluate(cfg, resume=False)


@pytest.mark.parametrize("split", ["train", "test"])
def test_mapper_and_lazy_student_must_agree_on_the_channel_order(split):
    key = f"dataloader.{split}.mapper.image_format"
    cfg = load_config("configs/ssimkd_R50.py", [f"{key}=RGB", "train.device=cpu"])
    with pytest.raises(ConfigError, match=f"{key} is RGB and the student takes BGR"):
        lazy_driver.check_image_format(cfg, lazy_driver.build_model(cfg), "train", "test")
    if split == "test":
        with pytest.raises(ConfigError, match=f"{key} is RGB"):
            lazy_driver.evaluate(cfg, resume=False)


@pytest.mark.soak
def test_the_kept_teacher_is_as_good_as_the_readme_says(yaml, tmp_path):
    assert os.path.getsize(ROOT / TEACHER_FILE) <= 4_000_000  # bytes
    command = [sys.executable, "train_net.py", "--config-file", "configs/shapes/teacher.yaml"]
    command += ["--eval-only", "MODEL.WEIGHTS", TEACHER_FILE, "OUTPUT_DIR", str(tmp_path)]
    env = {**os.environ, "DETECTRON2_DATASETS": "datasets"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    found = json.loads((tmp_path / "results.json").read_text())["bbox"]["AP"]
    readme = (ROOT / "README.md").read_text().splitlines()
    (line,) = [row for row in readme if row.startswith("|teacher|")]
    # libraries of another version decode and round a little differently
    assert found == pytest.approx(float(line.split("|")[2]), abs=0.5)


@pytest.mark.parametrize("data", ["shapes", "photos"])
def test_the_kept_teacher_is_its_config(data):
    cfg = without_pretraining(load_config(f"configs/{data}/teacher.yaml", splits=()))
    kept = weights(ROOT / f"configs/{data}/teacher.pth")
    # Detectron2's main keeps this number in a FrozenBatchNorm2d, v0.5 does not
    counted = {key for key in build_model(cfg).state_dict() if not key.endswith("batches_tracked")}
    assert counted == {key for key in kept if not key.endswith("batches_tracked")}


def own_records():
    """Records that are not in Detectron2's catalog."""
    return DatasetCatalog.get("ssimkd_shapes_val")[:2]


def test_a_lazy_config_with_records_of_ones_own_trains_and_is_evaluated(few_images, tmp_path):
    opts = [f"train.output_dir={tmp_path}", "train.max_iter=1", "+train.check_images=0"]
    cfg = load_config("tests/engine/lazy_shapes.py", opts)
    cfg.dataloader.train.dataset = cfg.dataloader.test.dataset = L(own_records)()
    cfg.dataloader.evaluator.dataset_name = "ssimkd_shapes_val"
    check_config(cfg, parse("train", ["--config-file", ""]))
    assert "AP" in lazy_driver.train(cfg, resume=False)["bbox"]
    cfg.dataloader.test = None
    assert lazy_driver.train(cfg, resume=False) == {}
    with pytest.raises(ConfigError, match="dataloader.test.dataset.names is empty"):
        check_config(cfg, parse("train", ["--config-file", "", "--eval-only"]))
