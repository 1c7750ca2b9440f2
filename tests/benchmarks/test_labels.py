"""AP against the share of labelled images: the runs and the table."""

import labels
import pytest
from ssimkd import ConfigError
from ssimkd.engine.arguments import load_config


def test_the_third_student_sees_the_images_that_the_others_leave_out(tmp_path):
    words = ["--on", "photos", "--shares", "25", "100", "--seeds", "1", "--out", str(tmp_path)]
    runs = labels.plan(labels.parse_args(words))
    assert [key[:2] for key in runs] == [
        *((25, method) for method in labels.METHODS), (100, "vanilla"), (100, "ssim")
    ]  # fmt: skip
    cfgs = [load_config(run.config, run.opts, splits=()) for run in runs.values()]
    assert {cfg.DATASETS.TRAIN[0] for cfg in cfgs[:3]} == {"bccd_train[:25%]"}
    assert [cfg.DATASETS.UNLABELED for cfg in cfgs[:3]] == [(), (), ("bccd_train[25%:]",)]
    assert cfgs[2].SOLVER.IMS_PER_BATCH_UNLABELED == cfgs[2].SOLVER.IMS_PER_BATCH == 4
    assert [cfg.MODEL.META_ARCHITECTURE for cfg in cfgs[:2]] == ["GeneralizedRCNN", "DistillRCNN"]
    assert len({run.folder for run in runs.values()}) == 5


def test_a_row_per_method_and_a_column_per_share(tmp_path):
    samples = {
        (100, "vanilla"): {1: 30.0, 2: 34.0},
        (10, "vanilla"): {1: 10.0},
        (10, "ssim"): {1: 18.0, 2: 19.0},
        (10, "ssim on all images"): {1: 20.0, 2: 22.0},
    }
    head, _, *rows = labels.table(samples).splitlines()
    assert head == "| box AP | 10 % of the labels | 100 % of the labels |"
    assert rows == [
        "| vanilla | 10.0 (1 of 2 seeds) | 32.0 +- 2.8 |",
        "| ssim | 18.5 +- 0.7 | - |",
        "| ssim on all images | 21.0 +- 1.4 | - |",
        "| ssim on all images minus ssim | +2.5 [-3.9, +8.9] | - |",  # 2 and 3: 2.5 +- 12.7 x 0.5
    ]
    labels.plot(samples, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_overrides_and_shares_that_make_no_comparison_are_refused():
    for key in ("SEED", "DATASETS.TRAIN", "MODEL.DISTILL.LOSSES"):
        with pytest.raises(ConfigError, match=key):
            labels.plan(labels.parse_args(["--shares", "10", "--", key, "1"]))
    with pytest.raises(SystemExit):
        labels.parse_args(["--shares", "150"])
