"""The look at a pair before a long run: its table and its exit status."""

import logging

import pytest
from conftest import zoo_cfg
from ssimkd.commands import check
from ssimkd.teacher.preprocessing import Preprocessing
from ssimkd.utils.config_files import load_config

YAML, LAZY = "configs/shapes/ssimkd.yaml", "tests/engine/lazy_shapes.py"


@pytest.fixture
def run_check(few_names, capsys):
    """Runs the command on few images; returns its error, or its status and its table's rows."""
    train, val = few_names

    def run(config, *opts, flags=("--iterations", "5")):
        if config == YAML:
            opts = ("DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{val}',)", *opts)
        else:
            names = zip(("train", "test"), few_names)
            opts = (*(f"dataloader.{s}.dataset.names={n}" for s, n in names), *opts)
        with pytest.raises(SystemExit) as stopped:
            check.main(["--config-file", config, *flags, *opts])
        if isinstance(stopped.value.code, str):
            return stopped.value.code
        lines = capsys.readouterr().out.split("\n\n")[-1].splitlines()
        parts = (line.split("  ", 1) for line in lines if line)
        return stopped.value.code, [(name.strip(), text.strip()) for name, text in parts]

    return run


def shares(rows):
    return {name: float(text.split()[1]) for name, text in rows if "total loss" in text}


def test_a_good_pair(run_check):
    opts = ("SOLVER.IMS_PER_BATCH", "4", "MODEL.DISTILL.WARMUP_ITERS", "1000")
    opts += ("MODEL.DISTILL.LOG_GRADIENTS", "1000")  # its line comes last and has no losses
    status, rows = run_check(YAML, *opts, "MODEL.DISTILL.ADAPTER", "conv1x1")
    table = dict(rows)
    assert status == 0
    assert table["student sees"] == table["teacher sees"]
    assert table["student sees"].startswith("BGR, mean 103.5, 116.3, 123.7, std 1, 1, 1, sides")
    assert table["level p3"] == "64 channels -> p3, 64 by conv1x1; stride 8"
    found = [text for name, text in rows if name == "check"]
    assert found[0].startswith("Teacher and student agree cell by cell: p2 (64, ")
    assert found[1].startswith("The teacher finds ") and found[1].endswith("8 training images")
    assert shares(rows)["ssim_kd_loss"] > 50  # not of the first iterations of a ramp
    assert abs(sum(shares(rows).values()) - 100) <= 3  # rounded
    assert " for 1000 iterations" in table["time"] and table["memory"].split()[1] == "GiB"


def test_a_lazy_pair(run_check):
    opts = ("+model.distiller.warmup_iters=1000", "train.max_iter=1000")
    flags = ("--iterations", "6")
    status, rows = run_check(LAZY, *opts, flags=flags)
    assert status == 0
    assert ("level p5", "64 channels -> p5, 64; stride 32") in rows
    assert shares(rows)["ssim_kd_loss"] > 50
    assert " for 1000 iterations" in dict(rows)["time"]


def test_a_weight_that_drowns_the_detector_and_a_ramp_that_never_ends_are_status_1(run_check):
    opts = ("SOLVER.IMS_PER_BATCH", "2", "MODEL.DISTILL.WARMUP_ITERS", "5000")
    opts += ("MODEL.DISTILL.SSIM.WEIGHT", "1e4", "SOLVER.CLIP_GRADIENTS.ENABLED", "False")
    status, rows = run_check(YAML, *opts, flags=("--iterations", "5"))
    ramp, share = [text for name, text in rows if name == "WARNING"]
    assert status == 1
    assert ramp.startswith("MODEL.DISTILL.WARMUP_ITERS is 5000, and the run distils in 1000 ")
    assert "times the detector's own in iteration 0" in share


def test_a_teacher_that_finds_nothing_is_status_1(run_check, teacher_file):
    opts = ("SOLVER.IMS_PER_BATCH", "2", "MODEL.DISTILL.TEACHER.WEIGHTS", teacher_file)
    status, rows = run_check(YAML, *opts)
    assert status == 1
    (warning,) = [text for name, text in rows if name == "WARNING"]
    assert warning.startswith("The teacher finds ")


def test_a_note_is_no_warning():
    remarks = check.LogCollector()
    for number, extra in enumerate(({"harmless": True}, {"harmless": False}, {})):
        record = logging.LogRecord("ssimkd", logging.WARNING, "", 0, str(number), None, None)
        vars(record).update(extra)
        remarks.emit(record)
    assert list(remarks.rows()) == [("note", "0"), ("WARNING", "1"), ("WARNING", "2")]


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.DISTILL.TEACHER.WEIGHTS", "no.pth"], "MODEL.DISTILL.TEACHER.WEIGHTS"),
        (["MODEL.DISTILL.LOSSES", "()"], "MODEL.DISTILL: nothing is distilled"),
        (["SOLVER.IMS_PER_BATCH", "7"], "--num-gpus: 7 images cannot be shared by 2 GPUs"),
    ],
)
def test_a_pair_that_cannot_run_is_an_error_in_one_line(run_check, opts, message):
    said = run_check(YAML, *opts, flags=("--iterations", "5", "--num-gpus", "2"))
    assert said.startswith(f"error: {message}") and "\n" not in said


def test_what_the_whole_run_costs():
    metrics = {"time": 0.5, "data_time": 0.01, "total_loss": 4.0, "loss_cls": 1.0, "lr": 0.0}
    cfg = zoo_cfg("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    rows = dict(check.cost_rows(cfg, {**metrics, "ssim_kd_loss": 3.0}))
    assert rows["ssim_kd_loss"] == "3, 75.0 % of the total loss"
    assert "ssimkd weight" in rows["shares"]
    assert rows["time"].endswith("0.01 s of it waiting for data: 12:30:00 for 90000 iterations")


def test_a_detector_may_prepare_images_in_its_own_way():
    assert check.prepared(Preprocessing("RGB")) == "RGB, prepared by code of its own"
    no_padding = Preprocessing("BGR", None, (1.0, 2.0), (3.0, 4.0), (None, None))
    assert check.prepared(no_padding).endswith("std 3, 4, sides padded to multiples of 1")


def test_a_loader_of_the_users_own_gets_no_argument():
    cfg = load_config("configs/ssimkd_R50.py", ["+dataloader.unlabeled=null"])
    cfg.dataloader.train = {"_target_": "my.loader", "images": 4}
    short = check.short_run_config(cfg, "folder", iterations=20, num_gpus=1)
    assert set(short.dataloader.train) == {"_target_", "images"}


def test_the_short_run_scales_the_batch_and_has_learning_rate_0():
    opts = ("DATASETS.UNLABELED", ("heap",), "MODEL.DISTILL.STOP_ITER", 5)
    cfg = zoo_cfg("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "VIS_PERIOD", 10, *opts)
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 37.4, 0.1]]
    short = check.short_run_config(cfg, "folder", iterations=20, num_gpus=8)
    assert short.SOLVER.IMS_PER_BATCH == 2 and short.SOLVER.BASE_LR == 0.0
    assert short.SOLVER.IMS_PER_BATCH_UNLABELED == 1 and short.MODEL.DISTILL.STOP_ITER == 0
    assert short.DATASETS.TEST == () and short.VIS_PERIOD == 0 and short.OUTPUT_DIR == "folder"
    assert short.TEST.EXPECTED_RESULTS == []
    assert cfg.SOLVER.IMS_PER_BATCH == 16  # the given one stays


def test_a_batch_for_more_gpus_than_the_reference(run_check, monkeypatch):
    """2 images on 1 GPU are 4 images on 2 GPUs in half as many iterations."""
    monkeypatch.setattr(check, "measure", lambda cfg, *others: {
        "time": 1.0, "data_time": 0.0, "total_loss": float(cfg.SOLVER.IMS_PER_BATCH),
    })  # fmt: skip
    opts = ("SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_WORLD_SIZE", "1")
    _, rows = run_check(YAML, *opts, flags=("--num-gpus", "2"))
    assert dict(rows)["time"].endswith("0:08:20 for 500 iterations")
    said = run_check(YAML, "SOLVER.REFERENCE_WORLD_SIZE", "3", "SOLVER.IMS_PER_BATCH", "8")
    assert said.startswith("error: SOLVER.REFERENCE_WORLD_SIZE: AssertionError")
    cfg = zoo_cfg("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "SOLVER.REFERENCE_WORLD_SIZE", 8)
    cfg.TEST.PRECISE_BN.ENABLED = True
    short = check.short_run_config(cfg, "folder", iterations=20, num_gpus=8)
    assert short.SOLVER.REFERENCE_WORLD_SIZE == 0 and not short.TEST.PRECISE_BN.ENABLED
