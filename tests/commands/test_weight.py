"""The proposed weight: it makes the ratio that it promises, with both drivers."""

import argparse
import re

import pytest
from conftest import shapes_cfg
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from ssimkd import ConfigError
from ssimkd.commands import weight
from ssimkd.engine.arguments import load_config
from ssimkd.modeling.several_teachers import Distillers

YAML = ("--config-file", "configs/shapes/ssimkd.yaml", "SOLVER.IMS_PER_BATCH", "1")
LAZY = (
    "--config-file", "tests/engine/lazy_shapes.py", "optimizer.lr=1e-9",
    "dataloader.train.total_batch_size=1", "train.max_iter=100",
)  # fmt: skip


@pytest.fixture
def suggest(few_shapes, monkeypatch, capsys):
    """Runs the command; returns (ratio now, ratio recommended, key of the weight, weight)."""
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)

    def run(*args):
        weight.main([*map(str, args)])
        said = capsys.readouterr()
        assert "it/s" not in said.err and "iteration" not in said.err  # no bar outside a terminal
        pattern = r"is (\S+) times(?:.|\n)* Recommended is (\S+):\n\n    (\S+)[ =](\S+)\n$"
        now, wanted, key, number = re.search(pattern, said.out).groups()
        return float(now), float(wanted), key, float(number)

    return run


def test_the_override_gives_the_recommended_ratio(suggest):
    # the student does not move, so the ratio is proportional to the weight
    still = (*YAML[:2], "--iters", 20, *YAML[2:], "SOLVER.BASE_LR", 1e-9)
    ratio, wanted, key, number = suggest(*still)
    assert wanted == weight.RECOMMENDED and number == pytest.approx(16 * wanted / ratio, rel=0.06)
    assert suggest(*still, key, number)[0] == pytest.approx(wanted, rel=0.06)  # two digits


def test_a_lazy_config(suggest):
    ratio, wanted, key, number = suggest(*LAZY[:2], "--iters", 20, *LAZY[2:])
    assert wanted == weight.RECOMMENDED and key == "model.distiller.losses.0.weight"
    assert number == pytest.approx(4.0 * wanted / ratio, rel=0.06)  # 4 is the default
    assert load_config(LAZY[1], [f"{key}={number}"]).model.distiller.losses[0].weight == number


def test_text_by_hand():
    rows = [{"iteration": i, "gradient_ratio": r} for i, r in enumerate([90.0, 9.0, 2.0, 4.0])]
    rows[-1].update({"ssim_kd/p3": 0.25, "gradient_ratio/p3": 8.0, "ssim_kd/p4": 0.5})
    weights = {"MODEL.DISTILL.SSIM.WEIGHT": 6.0, "MODEL.DISTILL.L2.WEIGHT": 3.0}
    text = weight.report(weights, weight.medians(rows))
    assert "| ssim_kd/p3 | 0.25 | 8 |\n| ssim_kd/p4 | 0.5 | - |" in text
    # the median of 2 and 4, the later half
    assert "distillation is 3 times" in text and "Recommended is 25:" in text
    assert text.endswith("    MODEL.DISTILL.SSIM.WEIGHT 50\n    MODEL.DISTILL.L2.WEIGHT 25")
    for value, where in ((0.0, "maps"), (2.0, "predictions")):  # 0: the weight is 0 in this run
        rows[-1]["gradient_ratio/roi"] = value
        text = weight.report(weights, weight.medians(rows))
        assert f"At the student's {where} the gradient" in text
    with pytest.raises(ConfigError, match="--iters"):
        weight.report(weights, {})


@pytest.mark.parametrize("flag", [("--iters", "19"), ("--num-gpus", "0")])
def test_what_cannot_be_measured_is_said_before_the_run(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        weight.main([*YAML[:2], *flag])
    assert re.search(f"{flag[0]}:? must be ", capsys.readouterr().err)


def test_a_config_without_a_loss_of_a_weight_is_refused():
    cfg = shapes_cfg("ssimkd", "MODEL.DISTILL.SSIM.WEIGHT", "0.0")
    with pytest.raises(ConfigError, match=r"MODEL\.DISTILL\.LOSSES"):
        weight.weights_of(cfg)


def test_several_teachers_have_losses_of_their_own():
    entry = {"CONFIG": "configs/shapes/teacher.yaml", "WEIGHTS": "configs/shapes/teacher.pth"}
    teachers = [{**entry, "NAME": "a", "LOSSES": ["l1", "pkd"]}, {**entry, "LOSSES": ["l1"]}]
    key = "MODEL.DISTILL"
    cfg = shapes_cfg("ssimkd", f"{key}.TEACHER.CONFIG", "", f"{key}.TEACHERS", teachers)
    assert weight.weights_of(cfg) == {f"{key}.L1.WEIGHT": 4.0, f"{key}.PKD.WEIGHT": 6.0}
    lazy = load_config("configs/ssimkd_R50.py", [])
    lazy.model.distiller = L(Distillers)(a=lazy.model.distiller, b=lazy.model.distiller)
    keys = [f"model.distiller.{name}.losses.0.weight" for name in "ab"]
    assert weight.weights_of(lazy) == dict.fromkeys(keys, 4.0)
    assert load_config("configs/ssimkd_R50.py", [f"{keys[0].replace('.a', '')}=5"])
    watched = LazyConfig.apply_overrides(lazy, weight.logging_gradients(lazy))
    assert watched.model.log_gradients == weight.PERIOD


@pytest.mark.parametrize("lazy", [False, True])
def test_a_loss_on_predictions_is_not_measured_beside_one_on_maps(lazy):
    """Nor is a loss measured before its gradient reaches the student."""
    if lazy:
        losses = [f"{{_target_: ssimkd.losses.{x}Loss}}" for x in ("SoftTarget", "ICD")]
        opts = [f"model.distiller.losses=[{','.join(losses)}]"]
        cfg = load_config("configs/ssimkd_R50.py", opts)
        node = "model.distiller.losses."
        measured = {f"{node}1.weight": 3.0}
        changed = [f"{node}0.weight=0.0", f"{node}1.detach_iters=0"]
    else:
        cfg = shapes_cfg("ssimkd", "MODEL.DISTILL.LOSSES", ("kd", "icd"))
        measured = {"MODEL.DISTILL.ICD.WEIGHT": 3.0}
        changed = ["MODEL.DISTILL.KD.WEIGHT", "0.0", "MODEL.DISTILL.ICD.DETACH_ITERS", "0"]
    assert weight.weights_of(cfg) == measured
    assert weight.logging_gradients(cfg)[: len(changed)] == changed
    alone = shapes_cfg("ssimkd", "MODEL.DISTILL.LOSSES", ("kd", "dkd"))
    assert len(weight.weights_of(alone)) == 2


def test_the_ratio_is_that_of_the_whole_weight():
    schedule = {"WARMUP_ITERS": 900, "COOLDOWN_ITERS": 5, "STOP_ITER": 9}
    key = "MODEL.DISTILL"
    opts = [x for name, value in schedule.items() for x in (f"{key}.{name}", value)]
    cfg = shapes_cfg("ssimkd", *opts, "MODEL.DISTILL.WANDB_PROJECT", "detectors")
    cfg.merge_from_list(weight.logging_gradients(cfg))
    assert [cfg.MODEL.DISTILL[name] for name in schedule] == [0, 0, 0]
    path = "configs/ssimkd_R50.py"
    opts = [f"model.distiller.{name.lower()}={value}" for name, value in schedule.items()]
    opts += ["+train.wandb_project=detectors"]
    lazy = load_config(path, [*opts, *weight.logging_gradients(load_config(path, opts))])
    assert [lazy.model.distiller[name.lower()] for name in schedule] == [0, 0, 0]
    assert cfg.MODEL.DISTILL.WANDB_PROJECT == lazy.train.wandb_project == ""


def test_a_training_that_fails_says_why():
    opts = ["MODEL.DISTILL.TEACHER.WEIGHTS", "gone.pth"]
    args = argparse.Namespace(config_file=YAML[1], iters=20, num_gpus=1, opts=opts)
    with pytest.raises(ConfigError, match=r"there is no file gone\.pth"):
        weight.probe(load_config(YAML[1], []), args)


def test_a_training_that_fails_after_it_has_logged_proposes_nothing(few_shapes, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)
    opts = [*YAML[2:], "SOLVER.MAX_ITER", "12", "MODEL.DISTILL.SSIM.WEIGHT", "4.0"]
    opts += ["SOLVER.BASE_LR", "1e30"]  # the losses become infinite
    args = argparse.Namespace(config_file=YAML[1], iters=300, num_gpus=1, opts=opts)
    with pytest.raises(ConfigError, match="the training failed. Its last line is: error: "):
        weight.probe(load_config(YAML[1], []), args)
