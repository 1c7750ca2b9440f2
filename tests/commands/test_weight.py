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
    """Runs the command; returns (ratio now, weight now, weight proposed)."""
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)

    def run(*args):
        weight.main([*map(str, args)])
        pattern = r"levels is (\S+),(?:.|\n)*ssim has the weight (\S+);.* and (\S+) gives"
        return [float(group) for group in re.search(pattern, capsys.readouterr().out).groups()]

    return run


def test_the_proposal_makes_the_ratio(suggest):
    # the student does not move, so the ratio is proportional to the weight
    still = (*YAML[:2], "--iters", 20, "--ratio", 2.0, *YAML[2:], "SOLVER.BASE_LR", 1e-9)
    ratio, now, proposed = suggest(*still)
    assert now == 16 and proposed == pytest.approx(16 * 2 / ratio, rel=0.06)  # two digits
    again, _, _ = suggest(*still, "MODEL.DISTILL.SSIM.WEIGHT", proposed)
    assert again == pytest.approx(2.0, rel=0.06)


def test_a_lazy_config(suggest):
    ratio, now, proposed = suggest(*LAZY[:2], "--iters", 20, *LAZY[2:])
    assert proposed == pytest.approx(now * 8 / ratio, rel=0.06)


def test_text_by_hand():
    rows = [{"iteration": i, "gradient_ratio": r} for i, r in enumerate([90.0, 9.0, 2.0, 4.0])]
    rows[-1].update({"ssim_kd/p3": 0.25, "gradient_ratio/p3": 8.0, "ssim_kd/p4": 0.5})
    text = weight.report({"ssim": 6.0, "l2": 3.0}, weight.medians(rows), 1.0)
    assert "| ssim_kd/p3 | 0.25 | 8 |\n| ssim_kd/p4 | 0.5 | - |" in text
    # the median of 2 and 4, the later half
    assert "over all levels is 3, outside the range of 5 to\n120 where" in text
    assert "ssim has the weight 6; the range is 10 to 2.4e+02, and 2 gives the ratio 1\n" in text
    assert "l2 has the weight 3; the range is 5 to 1.2e+02, and 1 gives the ratio 1" in text
    assert "inside the range" in weight.report({"ssim": 6.0}, {"gradient_ratio": 9.0}, 8.0)
    with pytest.raises(ConfigError, match="--iters"):
        weight.report({"ssim": 6.0}, {}, 1.0)


@pytest.mark.parametrize("flag", [("--iters", "19"), ("--num-gpus", "0"), ("--ratio", "0")])
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
    assert weight.weights_of(cfg) == {"a/l1": 4.0, "a/pkd": 6.0, "teacher2/l1": 4.0}
    lazy = load_config("configs/ssimkd_R50.py", [])
    lazy.model.distiller = L(Distillers)(a=lazy.model.distiller, b=lazy.model.distiller)
    assert weight.weights_of(lazy) == {"a/ssim": 4.0, "b/ssim": 4.0}
    watched = LazyConfig.apply_overrides(lazy, weight.logging_gradients(lazy))
    assert watched.model.log_gradients == weight.PERIOD


def test_a_training_that_fails_says_why():
    opts = ["MODEL.DISTILL.TEACHER.WEIGHTS", "gone.pth"]
    args = argparse.Namespace(config_file=YAML[1], iters=20, num_gpus=1, opts=opts)
    with pytest.raises(ConfigError, match=r"there is no file gone\.pth"):
        weight.probe(load_config(YAML[1], []), args)
