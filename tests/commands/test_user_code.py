"""Code of the user's own: --import, and the commands that get a run which was made with it."""

import json
import shutil
import sys

import pytest
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from ssimkd import KD_LOSS_REGISTRY
from ssimkd.commands import begin, check, export, load_trained, predict, report, train
from ssimkd.engine.arguments import load_arguments, read_arguments
from ssimkd.utils.user_code import IMPORTED
from ssimkd_cli import parse

NAME = "own_parts.nets"
CODE = """
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone

DatasetCatalog.register("own_data", list)
MetadataCatalog.get("own_data").thing_classes = ["crack", "hole"]
seen = []


@BACKBONE_REGISTRY.register()
def build_own_backbone(cfg, input_shape):
    return build_resnet_fpn_backbone(cfg, input_shape)


class Mapper(DatasetMapper):
    def __call__(self, record):
        seen.append((self.is_train, record["file_name"]))
        return super().__call__(record)
"""


def forget():
    """What this process knows of the module, as a new process does."""
    BACKBONE_REGISTRY._obj_map.pop("build_own_backbone", None)
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop("own_data", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "own_parts"]:
        del sys.modules[name]
    IMPORTED.clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_images):
    """The folder of a user's project, in which output/ holds a run of two iterations."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "own_parts").mkdir()
    (folder / "own_parts/nets.py").write_text(CODE)
    words = ["--import", NAME, "--config-file", str(ROOT / "configs/shapes/ssimkd.yaml")]
    words += ["MODEL.BACKBONE.NAME", "build_own_backbone", "DATALOADER.MAPPER", f"{NAME}.Mapper"]
    words += ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", "output"]
    words += ["MODEL.DISTILL.CHECK_IMAGES", "0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", sys.path[:])
        train.main(words)
        seen = sys.modules[NAME].seen
        assert {is_train for is_train, _ in seen} == {True, False}
        forget()
    return folder


@pytest.fixture(autouse=True)
def as_a_new_process(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    forget()


def test_the_record_and_the_exported_config_name_the_module(run):
    assert json.loads((run / "output/run.json").read_text())[0]["imports"] == [NAME]
    assert f"import {NAME}" in (run / "output/student.yaml").read_text().split("MODEL:")[0]


IMAGE = "{images}/000000.jpg"
DETECTOR = ["--config-file", "{run}/config.yaml", "--weights", "{run}/model_final.pth"]
COMMANDS = {
    predict: [*DETECTOR, IMAGE, "--output", "{out}/seen", "--confidence-threshold", "0"],
    export: [*DETECTOR, "--out", "{out}/exported"],
    report: ["{run}", "--out", "{out}/page.html"],
    check: ["--config-file", "{run}/config.yaml", "--iterations", "5"],
}
CASES = [pytest.param(c, words, id=c.__name__.split(".")[-1]) for c, words in COMMANDS.items()]


def filled(words, run, few_shapes, out):
    images = f"{few_shapes}/ssimkd_shapes/val"
    return [word.format(run=run / "output", images=images, out=out) for word in words]


@pytest.mark.parametrize("command, words", CASES)
def test_a_command_imports_what_the_run_imported(
    command, words, run, few_shapes, tmp_path, monkeypatch
):
    monkeypatch.chdir(run)
    monkeypatch.setattr("ssimkd.report.page.SAMPLE", 1)
    words = filled(words, run, few_shapes, tmp_path)
    if command is check:
        with pytest.raises(SystemExit) as ended:
            check.main(words)
        assert ended.value.code in (0, False, True)  # it ran to its end
    else:
        command.main(words)
    assert IMPORTED == [NAME]


def test_a_config_that_names_its_weights_imports_it(run, few_shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(run)
    words = ["--config-file", "{run}/config.yaml", *COMMANDS[predict][4:]]
    words += ["--opts", "MODEL.WEIGHTS", "{run}/model_final.pth"]
    predict.main(filled(words, run, few_shapes, tmp_path))
    assert IMPORTED == [NAME]


@pytest.mark.parametrize("command, words", CASES)
def test_a_command_says_what_is_missing(command, words, run, few_shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main(filled(words, run, few_shapes, tmp_path))
    assert f"{NAME} cannot be imported (ModuleNotFoundError" in ended.value.code
    assert "run.json" in ended.value.code and "\n" not in ended.value.code


def test_a_checkpoint_in_the_current_folder_imports_it_again(run, monkeypatch):
    monkeypatch.chdir(run / "output")
    monkeypatch.setattr(sys, "path", [str(run), *sys.path])
    words = ["--config-file", "shapes/vanilla.yaml", "--weights", "model_final.pth"]
    load_trained(begin("analyze", words))
    assert IMPORTED == [NAME]


def test_a_resumed_run_imports_it_again_before_its_data_is_read(run, monkeypatch):
    monkeypatch.chdir(run)
    words = ["--config-file", "shapes/vanilla.yaml", "--resume", "OUTPUT_DIR", "output"]
    words += ["DATASETS.TRAIN", "('own_data',)", "DATASETS.NUM_CLASSES_FROM_DATA", "True"]
    cfg = load_arguments(parse("train", words))
    assert IMPORTED == [NAME] and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2


@pytest.mark.parametrize("words", [["--resume"], ["--eval-only", "MODEL.WEIGHTS", "run/x.pth"]])
def test_a_loss_of_the_users_own_is_imported_before_its_keys_are_read(words, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text('[{"imports": ["own_parts"]}]')
    (tmp_path / "own_parts.py").write_text(
        "from ssimkd.losses import L1Loss, register_loss\n"
        "register_loss('own_l1')(type('OwnL1', (L1Loss,), {}))\n"
    )
    (tmp_path / "base.yaml").write_text("_BASE_: shapes/ssimkd.yaml\nOUTPUT_DIR: run\n")
    node = "MODEL: {DISTILL: {LOSSES: ['own_l1'], OWN_L1: {WEIGHT: 2.0}}}"
    (tmp_path / "own.yaml").write_text(f"_BASE_: base.yaml\n{node}\n")
    monkeypatch.chdir(tmp_path)
    flag, *overrides = words
    try:
        cfg = read_arguments(parse("train", ["--config-file", "own.yaml", flag, *overrides]))
        assert cfg.MODEL.DISTILL.OWN_L1.WEIGHT == 2.0
    finally:
        KD_LOSS_REGISTRY._obj_map.pop("own_l1", None)


def test_an_exported_student_that_was_moved_asks_for_it(run, few_shapes, tmp_path, monkeypatch):
    for name in ("student.pth", "student.yaml"):
        shutil.copy(run / "output" / name, tmp_path)
    words = ["--config-file", "{out}/student.yaml", IMAGE, "--output", "{out}/seen"]
    words = filled(words, run, few_shapes, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="'build_own_backbone'.*; --import names the module"):
        predict.main(words)
    monkeypatch.chdir(run)
    predict.main(["--import", NAME, *words])


def test_a_bug_in_the_module_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        report.main(["--import", "own_parts", "output"])
