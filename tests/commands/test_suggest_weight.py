"""The proposed weight: it makes the ratio that it promises, with both drivers."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, shapes_cfg
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from ssimkd import ConfigError
from ssimkd.commands import weight as suggest_weight
from ssimkd.engine.arguments import load_config
from ssimkd.modeling.several_teachers import Distillers

YAML = ("--config-file", "configs/shapes/ssimkd.yaml", "SOLVER.IMS_PER_BATCH", 2)
LAZY = (
    "--config-file", "configs/ssimkd_R50.py",
    "model.distiller.teacher.config=configs/shapes/teacher.yaml",
    "model.distiller.teacher.weights=configs/shapes/teacher.pth",
    "model.distiller.adapter=conv1x1", "model.roi_heads.num_classes=4", "optimizer.lr=1e-9",
    "model.distiller.in_features=[p2,p3]", "train.init_checkpoint=", "train.device=cpu",
    "dataloader.train.dataset.names=ssimkd_shapes_train",
    "dataloader.test.dataset.names=ssimkd_shapes_val",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.train.total_batch_size=1", "dataloader.train.num_workers=0", "+train.seed=1",
)  # fmt: skip


def suggest(few_shapes, monkeypatch, *args):
    """Runs the tool as a user does; returns (ratio now, weight now, weight proposed)."""
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)
    command = [
        sys.executable,
        "-m",
        "ssimkd.commands.main",
        "weight",
        "--iters",
        "20",
        *map(str, args),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"ratio is (\S+);(?:.|\n)*of ssim, now (\S+): .* is (\S+)\n", done.stdout)
    return [float(group) for group in found.groups()]


def test_the_proposal_makes_the_ratio(few_shapes, monkeypatch):
    still = (*YAML, "SOLVER.BASE_LR", 1e-9)  # the student does not move: the ratio is linear
    ratio, weight, proposed = suggest(few_shapes, monkeypatch, "--ratio", 2.0, *still)
    assert weight == 16 and proposed == pytest.approx(16 * 2 / ratio, rel=0.06)  # two digits
    again, _, _ = suggest(few_shapes, monkeypatch, *still, "MODEL.DISTILL.SSIM.WEIGHT", proposed)
    assert again == pytest.approx(2.0, rel=0.06)


def test_lazy(few_shapes, monkeypatch):
    ratio, weight, proposed = suggest(few_shapes, monkeypatch, *LAZY)
    assert weight == 4 and proposed == pytest.approx(4 * 8 / ratio, rel=0.06)


def test_text_by_hand():
    rows = [{"iteration": i, "gradient_ratio": r} for i, r in enumerate([90.0, 9.0, 2.0, 4.0])]
    rows[-1].update({"ssim_kd/p3": 0.25, "gradient_ratio/p3": 8.0, "ssim_kd/p4": 0.5})
    text = suggest_weight.report({"ssim": 6.0, "l2": 3.0}, suggest_weight.medians(rows), 1.0)
    assert "| ssim_kd/p3 | 0.25 | 8 |\n| ssim_kd/p4 | 0.5 | - |" in text
    assert "ratio is 3;" in text  # the median of 2 and 4, the later half
    assert "outside of 5 to\n120" in text
    assert "ssim, now 6: 10 to 2.4e+02; ratio 1 is 2\n" in text
    assert "l2, now 3: 5 to 1.2e+02; ratio 1 is 1" in text
    inside = suggest_weight.report({"ssim": 6.0}, {"gradient_ratio": 9.0}, 8.0)
    assert "that is within 5 to" in inside
    with pytest.raises(ConfigError, match="--iters"):
        suggest_weight.report({"ssim": 6.0}, {}, 1.0)


@pytest.mark.parametrize("flag", [("--iters", "19"), ("--num-gpus", "0"), ("--ratio", "0")])
def test_what_cannot_be_measured_is_said_before_the_run(flag, monkeypatch, capsys):
    monkeypatch.setattr(suggest_weight, "probe", None)
    monkeypatch.setattr(sys, "argv", ["suggest_weight.py", *YAML[:2], *flag])
    with pytest.raises(SystemExit, match="2"):
        suggest_weight.main()
    assert f"error: {flag[0]} must be " in capsys.readouterr().err


def test_its_flags_reach_the_training(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(suggest_weight, "probe", lambda *args: seen.append(args) or [])
    monkeypatch.setattr(sys, "argv", ["suggest_weight.py", *YAML[:2], "--trust-checkpoint"])
    with pytest.raises(SystemExit, match="no gradient"):
        suggest_weight.main()
    assert seen[0][-1] == ["--trust-checkpoint"]


@pytest.mark.parametrize("change", [("LOSSES", "()"), ("SSIM.WEIGHT", "0.0")])
def test_nothing_to_weigh(change):
    cfg = shapes_cfg("ssimkd", f"MODEL.DISTILL.{change[0]}", change[1])
    with pytest.raises(ConfigError, match="MODEL.DISTILL.LOSSES"):
        suggest_weight.weights_of(cfg)


def test_several_teachers_have_losses_of_their_own():
    entry = {"CONFIG": "configs/shapes/teacher.yaml", "WEIGHTS": "configs/shapes/teacher.pth"}
    teachers = [{**entry, "NAME": "a", "LOSSES": ["l1", "pkd"]}, {**entry, "LOSSES": ["l1"]}]
    key = "MODEL.DISTILL"
    cfg = shapes_cfg("ssimkd", f"{key}.TEACHER.CONFIG", "", f"{key}.TEACHERS", teachers)
    expected = {"a/l1": 4.0, "a/pkd": 6.0, "teacher2/l1": 4.0}
    assert suggest_weight.weights_of(cfg) == expected
    lazy = load_config("configs/ssimkd_R50.py", [])
    lazy.model.distiller = L(Distillers)(a=lazy.model.distiller, b=lazy.model.distiller)
    assert suggest_weight.weights_of(lazy) == {"a/ssim": 4.0, "b/ssim": 4.0}
    watched = LazyConfig.apply_overrides(lazy, suggest_weight.watching(lazy))
    assert watched.model.log_gradients == suggest_weight.PERIOD
    lazy.model.distiller = None
    with pytest.raises(ConfigError, match="model.distiller.losses"):
        suggest_weight.weights_of(lazy)


def test_a_training_that_fails_says_why():
    opts = ["MODEL.DISTILL.TEACHER.WEIGHTS", "gone.pth"]
    with pytest.raises(ConfigError, match="there is no file gone.pth"):
        suggest_weight.probe("configs/shapes/ssimkd.yaml", 20, 1, opts)
