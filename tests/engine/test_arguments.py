"""Wrong input ends in one line that names what to change, and no file is touched."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, shapes_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import SimpleTrainer
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from PIL import Image
from ssimkd import ConfigError
from ssimkd.commands import train as train_net
from ssimkd_cli import parse

KD, TEACHER = "MODEL.DISTILL", "MODEL.DISTILL.TEACHER"
YAML, VANILLA = "configs/shapes/ssimkd.yaml", "configs/shapes/vanilla.yaml"
LAZY = "configs/ssimkd_R50.py"
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 32, "width": 32}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 9, 9], "area": 81, "iscrowd": 0}
    ],
    "categories": [{"id": 1, "name": "crack"}],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of right and wrong files; {files} stands for its path in the cases below."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "garbage.pth").write_text("garbage")
    (folder / "notes.txt").write_text("")
    (folder / "good.json").write_text(json.dumps(COCO))
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "a.png")
    for name, config in (("student", "vanilla"), ("teacher", "teacher")):
        torch.manual_seed(0)
        torch.save({"model": build_model(shapes_cfg(config)).state_dict()}, folder / f"{name}.pth")
    yield folder
    if "own" in DatasetCatalog:
        DatasetCatalog.remove("own")
        MetadataCatalog.remove("own")


def own(name):
    entry = f"[{{'NAME': 'own', 'JSON': '{{files}}/{name}', 'IMAGES': '{{files}}'}}]"
    return [YAML, "DATASETS.COCO", entry, "DATASETS.TEST", "('own',)"]


def evaluate(weights):
    return [VANILLA, "--eval-only", "MODEL.WEIGHTS", f"{{files}}/{weights}"]


# The words behind --config-file, and a part of the line that the command ends with.
CASES = [
    # the command line
    ([], "expected one argument"),
    ([""], "--config-file is missing"),
    (["nowhere.yaml"], "--config-file: 'nowhere.yaml' is neither"),
    ([YAML, "--no-flag"], "unrecognized arguments: --no-flag"),
    ([YAML, "--num-gpus", "-1"], "--num-gpus is -1"),
    ([YAML, "--num-gpus", "2"], "--num-gpus is 2 and the device is cpu"),
    ([YAML, "--num-gpus", "99", "MODEL.DEVICE", "cuda"], "--num-gpus is 99"),
    ([YAML, "--machine-rank", "3"], "--machine-rank is 3"),
    ([YAML, "--num-machines", "2", "--dist-url", "x"], "--dist-url: x is not an address"),
    ([YAML, "--timeout", "nan"], "--timeout: must be above 0"),
    ([YAML, "SOLVER.MAX_ITER", "5", "--resume"], "--resume: flags stand before the overrides"),
    # a key or value that is not one
    ([YAML, "MODEL.NO_KEY", "1"], "MODEL.NO_KEY"),
    ([YAML, "SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
    ([YAML, f"{KD}.IN_FEATURES", "None"], f"{KD}.IN_FEATURES is None"),
    ([YAML, f"{KD}.LOSSES", "('sim',)"], f"{KD}.LOSSES: there is no loss 'sim'"),
    ([YAML, f"{KD}.SSIM.WEIGHT", "-1.0"], f"{KD}.SSIM: weight must be a finite number >= 0"),
    ([YAML, f"{KD}.CHECK_IMAGES", "-1"], f"{KD}: check_images must be an integer >= 0"),
    ([YAML, f"{KD}.INHERIT", "['tail']"], f"{KD}.INHERIT: the student has no weights in 'tail'"),
    # Detectron2 raises an error; the line names the key
    ([YAML, "SOLVER.LR_SCHEDULER_NAME", "X"], "SOLVER: ValueError: Unknown LR scheduler: X (trace"),
    ([YAML, "DATALOADER.SAMPLER_TRAIN", "X"], "DATALOADER or INPUT: ValueError: Unknown training"),
    (
        [YAML, "MODEL.META_ARCHITECTURE", "X"],
        "META_ARCHITECTURE: KeyError: \"No object named 'X' found",
    ),
    # the teacher and the weights
    ([YAML, f"{TEACHER}.CONFIG", "nowhere"], f"{TEACHER}.CONFIG"),
    ([YAML, f"{TEACHER}.WEIGHTS", "no.pth"], f"{TEACHER}.WEIGHTS: there is no file no.pth"),
    ([YAML, f"{TEACHER}.WEIGHTS", "{files}/student.pth"], f"{TEACHER}.WEIGHTS: "),
    ([YAML, "MODEL.WEIGHTS", "{files}/no.pth"], "MODEL.WEIGHTS: there is no file "),
    ([YAML, "MODEL.WEIGHTS", "http://127.0.0.1:9/x.pth"], "MODEL.WEIGHTS: cannot fetch http:"),
    ([VANILLA, "--eval-only"], "MODEL.WEIGHTS is empty: name the checkpoint to evaluate"),
    (evaluate("garbage.pth"), "MODEL.WEIGHTS: {files}/garbage.pth cannot be read"),
    (evaluate("teacher.pth"), "MODEL.WEIGHTS: {files}/teacher.pth does not fit the model"),
    # the data
    ([YAML, "DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
    ([YAML, "DATASETS.TRAIN", "('shape',)"], "DATASETS.TRAIN: no data set 'shape' is registered"),
    ([YAML, "--import", "no_parts"], "--import: no_parts cannot be imported (ModuleNotFoundError"),
    ([YAML, "DATALOADER.MAPPER", "no_parts.Mapper"], "DATALOADER.MAPPER: "),
    ([YAML, "MODEL.BACKBONE.NAME", "no"], "; --import names the module that holds it (traceback"),
    ([*evaluate("student.pth"), "DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
    (own("nowhere.json"), "own: {files}/nowhere.json cannot be read: FileNotFoundError"),
    (own("good.json"), "own has 1 thing classes and the head has 4: set MODEL.ROI_HEADS.NUM_CLA"),
    # the machine
    ([YAML, "SOLVER.AMP.ENABLED", "True"], "SOLVER.AMP.ENABLED"),
    ([YAML, "OUTPUT_DIR", "{files}/notes.txt/x"], "OUTPUT_DIR: cannot write to {files}/notes.txt"),
    # a LazyConfig
    ([LAZY, "nothing=1"], "nothing: there are the keys"),
    ([LAZY, "MODEL.WEIGHTS", "x.pth"], "MODEL.WEIGHTS: an override of a .py config is written"),
    ([LAZY, "train.init_checkpoint=no.pth"], "train.init_checkpoint: there is no file no.pth"),
    ([LAZY, "dataloader.train.dataset.names=no"], "dataloader.train.dataset.names: no data set"),
    ([LAZY, "+model.heft=1"], "model: TypeError: "),
    ([LAZY, "model.distiller.losses.0.weight=-1"], "weight must be a finite number >= 0, got -1"),
    ([LAZY, "+model.distiller.teacher.weight=x"], "model.distiller.teacher: "),
    ([LAZY, "+train.check_images=1.5"], "train: check_images must be an integer >= 0, got 1.5"),
    ([LAZY, "+train.inherit=neck"], "train.inherit must be a list of names of modules, got"),
    (
        [LAZY, "+train.inherit={a: [neck]}"],
        "train.inherit: 'a' is not the name of a teacher; there is one teacher",
    ),
    ([LAZY, "+optimizer.heft=1"], "optimizer: TypeError: "),
    ([LAZY, "+train.checkpointer.x=1"], "train.checkpointer: TypeError: "),
]
SMALL = [
    "model.distiller.teacher.config=configs/shapes/teacher.yaml",
    "model.distiller.teacher.weights=configs/shapes/teacher.pth", "model.roi_heads.num_classes=4",
    "model.distiller.adapter=conv1x1", "dataloader.train.num_workers=0",
    "dataloader.train.dataset.names=ssimkd_shapes_train", "dataloader.train.total_batch_size=2",
    "dataloader.test.dataset.names=ssimkd_shapes_val", "train.device=cpu", "train.init_checkpoint=",
]  # fmt: skip


class StartedError(Exception):
    """The training began, so the input was accepted."""


@pytest.fixture(autouse=True)
def never_train(monkeypatch, few_images):
    def start(self):
        raise StartedError

    monkeypatch.setattr(SimpleTrainer, "run_step", start)
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", str)  # it takes seconds


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def line_of(words, capsys):
    """Runs the command in this process; returns the line that it ends with."""
    with pytest.raises(SystemExit) as end:
        train_net.main(words)
    line = end.value.code
    if not isinstance(line, str):
        assert line == 2  # argparse's
        line = capsys.readouterr().err.rstrip("\n")
    return line


@pytest.mark.parametrize("words, expected", CASES, ids=[" ".join(words) for words, _ in CASES])
def test_wrong_input_is_one_line(words, expected, files, tmp_path, capsys):
    before, folder = contents(files), str(files)
    words = [word.replace("{files}", folder) for word in words]
    if words[:1] == [LAZY]:
        words[1:1] = [*SMALL, f"train.output_dir={tmp_path}"]
    elif words[-1:] != [""] and "OUTPUT_DIR" not in words and "--resume" not in words[3:]:
        words += ["OUTPUT_DIR", str(tmp_path)] * (len(words) > 1)
    line = line_of(["--config-file", *words], capsys)
    assert line.startswith("error: ") and "\n" not in line
    assert expected.replace("{files}", folder) in line
    assert contents(files) == before
    # a run may have written its log, its config and its record
    left = {path.name for path in contents(tmp_path) if not path.name.startswith("events")}
    assert left <= {"log.txt", "config.yaml", "run.json", "metrics.json"}


@BACKBONE_REGISTRY.register()
def build_users_backbone(cfg, input_shape):
    """With a bug."""
    return {}["no key"]


def test_a_bug_in_a_users_backbone_keeps_its_traceback(tmp_path):
    words = ["MODEL.BACKBONE.NAME", "build_users_backbone", "OUTPUT_DIR", str(tmp_path)]
    with pytest.raises(KeyError, match="no key"):
        train_net.main(["--config-file", VANILLA, *words])
    log = (tmp_path / "log.txt").read_text()
    assert log.count('return {}["no key"]') == log.count("Traceback") == 1


def test_the_log_has_a_warning_about_the_data_and_the_file_has_the_scaled_config(tmp_path):
    (tmp_path / "a.jpg").touch()
    image = {"id": 1, "file_name": "a.jpg", "height": 9, "width": 9}
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 3, n]} for n in (0, 3)]
    content = {
        "images": [image],
        "annotations": [{"id": number, **box} for number, box in enumerate(boxes)],
        "categories": [{"id": number, "name": str(number)} for number in range(1, 5)],
    }
    (tmp_path / "own.json").write_text(json.dumps(content))
    entry = {"NAME": "own_logged", "JSON": f"{tmp_path}/own.json", "IMAGES": str(tmp_path)}
    words = ["DATASETS.COCO", f"[{entry}]", "DATASETS.TRAIN", "('own_logged',)"]
    words += ["SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.IMS_PER_BATCH", "8"]
    words += ["DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / "run")]
    with pytest.raises(StartedError):
        train_net.main(["--config-file", VANILLA, *words])
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("1 of 2 boxes have no area") == 1
    assert log.count("Auto-scaling the config to batch_size=4") == 1
    assert "IMS_PER_BATCH: 4" in (tmp_path / "run/config.yaml").read_text()
    DatasetCatalog.remove("own_logged")
    MetadataCatalog.remove("own_logged")


@pytest.mark.parametrize("config", [YAML, LAZY])
def test_right_settings_start_the_training(config, tmp_path):
    if config == LAZY:
        words = [*SMALL, f"train.output_dir={tmp_path}", "+train.check_images=0"]
    else:
        words = ["OUTPUT_DIR", str(tmp_path), f"{KD}.SSIM.WEIGHT", "16"]  # an integer for a float
    with pytest.raises(StartedError):
        train_net.main(["--config-file", config, *words])
    assert (tmp_path / "config.yaml").exists() and (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    "config, words, key, split",
    [
        ("configs/ssimkd_R50.yaml", ["MODEL.DEVICE", "cpu"], "DATASETS.TRAIN", "train2017"),
        (LAZY, ["--eval-only", "train.device=cpu"], "dataloader.test.dataset.names", "val2017"),
    ],
)
def test_missing_coco_is_named_by_a_process_that_writes_nothing(
    config, words, key, split, tmp_path
):
    command = [sys.executable, "train_net.py", "--config-file", config, *words]
    if key == "DATASETS.TRAIN":
        command += ["DATASETS.TEST", "()"]
    env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not os.listdir(tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {key}: ") and "DETECTRON2_DATASETS" in last
    for path in (f"coco/annotations/instances_{split}.json", f"coco/{split}"):
        assert str(tmp_path / path) in last


def test_the_check_before_a_resume_looks_for_checkpoints_as_the_run_does(tmp_path):
    words = ["--config-file", VANILLA, "--eval-only", "--resume", "OUTPUT_DIR", str(tmp_path)]
    args = parse("train", words)
    (tmp_path / "last_checkpoint").write_text("")
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is empty"):
        train_net.check(args)
    os.remove(tmp_path / "last_checkpoint")
    (tmp_path / "model_0000001.pth").write_text("")
    assert train_net.check(args) == "cpu"
