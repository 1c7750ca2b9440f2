"""Finding configs by name, and reading a YAML without running code in it."""

import inspect
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from detectron2.config import get_cfg
from fvcore.common.config import CfgNode
from ssimkd import ConfigError, config
from ssimkd.utils import config_files
from ssimkd.utils.compat import model_zoo
from ssimkd.utils.config_files import find_config, load_config

RETINA = "COCO-Detection/retinanet_R_50_FPN_1x"


@pytest.mark.parametrize(
    "name, found",
    [
        ("configs/ssimkd_R50.yaml", "configs/ssimkd_R50.yaml"),
        ("configs/ssimkd_R50", f"{ROOT}/configs/ssimkd_R50.yaml"),
        ("ssimkd_R50.py", f"{ROOT}/configs/ssimkd_R50.py"),
        (RETINA, model_zoo.get_config_file(f"{RETINA}.yaml")),
    ],
)
def test_a_config_is_found_by_file_by_our_name_and_by_the_zoos(name, found):
    assert find_config(name) == found


def test_our_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/ssimkd_R50.yaml") == f"{ROOT}/configs/ssimkd_R50.yaml"
    monkeypatch.setattr(config_files, "FOLDERS", (tmp_path / "configs",))  # an installed package
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/ssimkd_R50.yaml").write_text("")
    assert find_config("ssimkd_R50") == f"{tmp_path}/configs/ssimkd_R50.yaml"


@pytest.mark.parametrize("base", ["shapes/vanilla.yaml", "ssimkd_R50.yaml", RETINA + ".yaml"])
def test_a_base_may_be_named_from_any_folder(tmp_path, base):
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {base}\nOUTPUT_DIR: mine\n")
    expected = load_config(base, ["OUTPUT_DIR", "mine"])
    assert load_config(str(tmp_path / "mine.yaml")) == expected


def test_bases_may_be_a_list_and_have_any_file_name(tmp_path):
    (tmp_path / "ssimkd_R50 (copy).yaml").write_text("SEED: 7\n")
    (tmp_path / "mine.yaml").write_text("_BASE_: [ssimkd_R50.yaml, 'ssimkd_R50 (copy).yaml']\n")
    if "list" in inspect.getsource(CfgNode.load_yaml_with_base):  # not in an older fvcore
        assert load_config(str(tmp_path / "mine.yaml")) == load_config("ssimkd_R50", ["SEED", 7])
    (tmp_path / "mine.yaml").write_text("_BASE_ : 'ssimkd_R50 (copy).yaml'\n")
    assert load_config(str(tmp_path / "mine.yaml")).SEED == 7


def test_a_base_that_does_not_exist_is_not_replaced_by_another_file(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "common.yaml").write_text("OUTPUT_DIR: of_the_current_folder\n")
    monkeypatch.chdir(tmp_path)
    for base in ("common.yaml", "../bases/ssimkd_R50.yaml"):
        (tmp_path / "own/mine.yaml").write_text(f"_BASE_: '{base}'\n")
        with pytest.raises(ConfigError, match=f"FileNotFoundError.*{base[-11:]}"):
            load_config("own/mine.yaml")


def test_an_exported_student_has_its_own_weights(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "student.pth").touch()
    (tmp_path / "a/student.yaml").write_text("MODEL: {WEIGHTS: student.pth}\n")
    monkeypatch.chdir(tmp_path / "b")
    assert load_config("../a/student.yaml").MODEL.WEIGHTS == "../a/student.pth"


@pytest.mark.parametrize("name", ["", "nowhere.yaml", "configs", "shapes", "../configs"])
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(ConfigError, match=r"is neither a \.yaml or \.py file, nor the name of a"):
        find_config(name)


def test_configs_read_as_detectron2_reads_them():
    expected = get_cfg()
    config.add_ssimkd_config(expected)
    expected.merge_from_file(f"{ROOT}/configs/ssimkd_R50.yaml")
    assert load_config("ssimkd_R50") == expected
    # The zoo's config of RetinaNet holds code for the sizes of its anchors.
    expected, found = model_zoo.get_config(f"{RETINA}.yaml").MODEL, load_config(RETINA).MODEL
    found.WEIGHTS = expected.WEIGHTS
    assert {key: found[key] for key in expected} == dict(expected)
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.safe_load("!!python/object/apply:eval ['1']")


@pytest.mark.parametrize(
    "content, message",
    [
        ("A: 1\nB: !!python/object/apply:os.mkdir ['ran']", "line 2: code in a .yaml is not run"),
        ("A: [1\nB: 2", "line 2: "),
        ("", "x.yaml holds no keys"),
        ("[1, 2]", "x.yaml holds no keys"),
        ("SOLVER: {LR: 1.0}", "Non-existent config key: SOLVER.LR"),
        ("SOLVER: {BASE_LR: 1}", "write it with a decimal point"),
        ("_BASE_: nowhere.yaml", "x.yaml: FileNotFoundError: .*nowhere.yaml"),
        ("_BASE_: code.yaml", "code.yaml, line 1: code in a .yaml is not run"),
        ("\0", "x.yaml: ReaderError"),
    ],
)
def test_a_wrong_yaml_is_one_line_that_names_the_place(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(content)
    (tmp_path / "code.yaml").write_text("A: !!python/object/apply:os.mkdir ['ran']")
    with pytest.raises(ConfigError, match=message) as error:
        load_config("x.yaml")
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "ran").exists()


def test_overrides_take_an_integer_for_a_float_and_new_keys_of_a_lazy_config():
    cfg = load_config("ssimkd_R50", ["SOLVER.BASE_LR", "1", "MODEL.DISTILL.SSIM.WEIGHT", 2])
    assert cfg.SOLVER.BASE_LR == 1.0 and cfg.MODEL.DISTILL.SSIM.WEIGHT == 2.0
    cfg = load_config("ssimkd_R50.py", ["+note=1", "model.distiller.warmup_iters=5"])
    assert cfg.note == 1 and cfg.model.distiller.warmup_iters == 5


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("ssimkd_R50", ["SOLVER.BASE_LR"], "SOLVER.BASE_LR: AssertionError: Override list has odd"),
        ("ssimkd_R50", ["SOLVER.LR", "1"], "SOLVER.LR 1: .*Non-existent key: SOLVER.LR"),
        ("ssimkd_R50", ["SOLVER.BASE_LR", "x"], "SOLVER.BASE_LR x: ValueError: Type mismatch"),
        ("ssimkd_R50", ["OUTPUT_DIR.U", "x"], "OUTPUT_DIR.U x: "),
        (
            "ssimkd_R50",
            ["MODEL.DISTILL.IN_FEATURE", "['p2']"],
            "did you mean MODEL.DISTILL.IN_FEATURES",
        ),
        ("ssimkd_R50", ["MODEL.DISTIL.ADAPTER", "none"], "did you mean MODEL.DISTILL?"),
        ("ssimkd_R50", ["MODEL.DISTILL.LOSSES", "ssim"], """write a list, "\\['ssim'\\]"""),
        ("ssimkd_R50", ["MODEL.DISTILL.LOSSES", "ssim,kd"], """list, "\\['ssim', 'kd'\\]"$"""),
        ("ssimkd_R50", ["MODEL.DISTILL.LEVEL_WEIGHTS", "1"], r"""write a list, "\[1\]"$"""),
        ("ssimkd_R50.py", ["train.max_iters=1"], "did you mean max_iter?"),
        ("ssimkd_R50.py", ["model.distiler.adapter=none"], "did you mean distiller?"),
        ("ssimkd_R50.py", ["model.distiller.losses.ssim.weight=1"], "there are the keys 0 \\("),
        ("ssimkd_R50.py", ["model.distiller.losses.1.weight=1"], "there are the keys 0 \\("),
        ("ssimkd_R50.py", ["train.nothing=1"], "train.nothing: there are the keys output_dir, "),
        ("ssimkd_R50.py", ["train"], "train: an override of a .py config is written key=value"),
        ("ssimkd_R50.py", ["train.max_iter=[1"], "train.max_iter=.1: "),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(name, overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(name, overrides)
    assert len(str(error.value).splitlines()) == 1


def test_the_yaml_of_a_lazy_config_is_refused(tmp_path):
    (tmp_path / "student.yaml").write_text("model: {_target_: x}\ntrain: {init_checkpoint: y}\n")
    with pytest.raises(ConfigError, match=r"student.yaml is a LazyConfig, .* the .py config of"):
        load_config(tmp_path / "student.yaml")


def test_a_wrong_key_in_a_yaml_file_says_which_one_was_meant(tmp_path):
    (tmp_path / "x.yaml").write_text("MODEL: {DISTILL: {IN_FEATURE: [p2]}}")
    with pytest.raises(ConfigError, match="did you mean MODEL.DISTILL.IN_FEATURES"):
        load_config(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("MODEL: {DISTILL: {LOSSES: ssim}}")
    with pytest.raises(ConfigError, match=r"write a list, \['ssim'\]$"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "line", ["x.b.c = 2", "x.a.c = 2", "x['b']['c']", "property().fget = 1"], ids=str
)
def test_a_wrong_key_of_a_config_is_named_with_its_line_in_the_py(line, tmp_path):
    (tmp_path / "base.py").write_text("from omegaconf import OmegaConf\n")
    text = "from .base import OmegaConf\nx = OmegaConf.create({'a': 1})\n\n"
    (tmp_path / "x.py").write_text(text + line)
    with pytest.raises(ConfigError, match=r"x\.py, line 4: "):
        load_config(tmp_path / "x.py")


def test_a_path_may_stand_wherever_a_lazy_config_has_text(tmp_path):
    text = "from pathlib import Path\na = dict(b=[Path('c')], d='${.b}', e='???')\n"
    (tmp_path / "x.py").write_text(text)
    cfg = load_config(tmp_path / "x.py")
    assert cfg.a.b[0] == cfg.a.d[0] == "c"
    cfg = load_config(Path("ssimkd_R50"), ["OUTPUT_DIR", Path("there")])
    assert cfg.OUTPUT_DIR == "there"


def test_a_bug_in_a_py_config_keeps_its_traceback(tmp_path):
    (tmp_path / "x.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_config(str(tmp_path / "x.py"))
    sys.modules.pop("x", None)
