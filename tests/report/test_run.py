"""What is read from the folder of a run."""

import json
import os
import re
import sys

import pytest
import torch
from conftest import shapes_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from ssimkd import ConfigError
from ssimkd.engine.run_record import end_of, read_record, record_run
from ssimkd.report.run import Run


@pytest.fixture
def write(tmp_path):
    """Overrides -> a Run of a folder that holds only the config of a plain detector."""

    def write(*opts):
        (tmp_path / "config.yaml").write_text(shapes_cfg("vanilla", *opts).dump())
        return Run(str(tmp_path))

    return write


def save(path):
    """Writes a checkpoint of the plain detector with random weights; returns them."""
    state = build_model(shapes_cfg("vanilla")).state_dict()
    torch.save({"model": state}, path)
    return state


def test_weights_that_a_run_started_from_are_not_those_it_trained(write, tmp_path):
    state = save(tmp_path / "start.pth")
    record = {"command": "ssimkd eval", "evaluates": True, "ended": None}
    (tmp_path / "run.json").write_text(json.dumps([record]))
    run = write("MODEL.WEIGHTS", str(tmp_path / "start.pth"))
    found = run.build()
    assert not found.training
    assert all(torch.equal(x, state[name]) for name, x in found.state_dict().items())
    (tmp_path / "metrics.json").touch()  # it trained, but was killed before its first checkpoint
    (tmp_path / "run.json").write_text(json.dumps([{**record, "evaluates": False}]))
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        Run(str(tmp_path)).build()
    (tmp_path / "run.json").unlink()
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        Run(str(tmp_path)).build()


@pytest.mark.parametrize("left", ["backbone.bottom_up.", "backbone."])
def test_a_checkpoint_without_all_of_the_detector_is_refused(write, tmp_path, left):
    state = save(tmp_path / "student.pth")
    part = {name: tensor for name, tensor in state.items() if name.startswith(left)}
    torch.save({"model": part}, tmp_path / "student.pth")
    with pytest.raises(ConfigError, match="student.pth does not (fit the backbone|hold )"):
        write().build()


class Bare(torch.nn.Module):
    """A detector without a `.backbone`."""

    def __init__(self, cfg):
        super().__init__()
        self.net = torch.nn.Linear(2, 2)


def test_a_detector_without_a_backbone_is_read(write, tmp_path, monkeypatch):
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Bare", Bare)
    state = Bare(None).state_dict()
    torch.save({"model": state}, tmp_path / "student.pth")
    found = write("MODEL.META_ARCHITECTURE", "Bare").build().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_data_of_ones_own_that_is_gone_is_a_note(write, tmp_path):
    entry = {"NAME": "moved_away", "JSON": "gone.json", "IMAGES": "gone"}
    run = write("DATASETS.COCO", [entry], "DATASETS.TEST", ("moved_away",))
    assert run.images == [] and run.dataset == "moved_away"
    assert "gone" in run.notes[0] and run.notes[1:] == [
        "The data set moved_away is not registered."
    ]


def test_a_model_that_cannot_be_built_is_an_error_in_one_line(tmp_path):
    for text in ("model: {_target_: builtins.Student}\n", "model: 5\n", "train: {}\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match="its model cannot be built"):
            Run(str(tmp_path)).build()


def test_results_of_other_data_sets_are_left_out(write, tmp_path):
    results = {name: {"bbox": {"AP": 1.0}} for name in ("some_val", "other_val")}
    (tmp_path / "results.json").write_text(json.dumps(results))
    run = write("DATASETS.TEST", ("ssimkd_shapes_val",))
    assert run.results == {} and "other data sets" in run.notes[-1]
    assert write("DATASETS.TEST", ("a_val", "other_val")).results == results["other_val"]


def test_results_of_a_later_evaluation_on_other_data_are_left_out(write, tmp_path):
    (tmp_path / "results.json").write_text('{"bbox": {"AP": 1.0}}')
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference/coco_instances_results.json").write_text("[]")
    for test, expected in (("a", {"bbox": {"AP": 1.0}}), ("b", {}), ("a", {"bbox": {"AP": 1.0}})):
        with record_run(str(tmp_path), [test]):
            pass
        run = write("DATASETS.TEST", ("a",))
        assert run.results == expected and (run.detections is None) == (not expected)
        assert any("other data sets" in note for note in run.notes) == (not expected)


def test_scalars_of_a_resumed_and_of_a_killed_run(write, tmp_path):
    lines = ['{"iteration": 1, "lr": 1}', '{"iteration": 2, "lr": 2}', '{"iteration": 2, "lr": 5}']
    (tmp_path / "metrics.json").write_text("\n".join([*lines, '{"iteration": 3, "l']))
    run = write()
    assert run.scalars["lr"] == ([1, 2], [1, 5])
    assert run.notes == [f"Line 4 of {tmp_path / 'metrics.json'} is not JSON and was skipped."]


def test_a_new_run_in_the_same_file_replaces_the_earlier_one(write, tmp_path):
    rows = ((19, 1), (39, 2), (59, 3), (39, 4), (79, 5))
    lines = [{"iteration": i, "total_loss": v, "x": v} for i, v in rows]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert write().scalars["x"] == ([19, 39, 79], [1, 4, 5])
    lines += [{"iteration": 9, "total_loss": 6}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert write().scalars == {"total_loss": ([9], [6])}


def test_a_scalar_of_an_earlier_iteration_takes_nothing_away(write, tmp_path):
    """Detectron2 writes it again, after the losses of the iteration in which it writes."""
    lines = []
    for start in (0, 0):  # the second run begins anew
        for now in (start + 19, start + 39):
            lines += [{"iteration": now, "total_loss": now}, {"iteration": now - 9, "ratio": now}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    expected = {"total_loss": ([19, 39], [19, 39]), "ratio": ([10, 30], [19, 39])}
    assert write().scalars == expected


def test_an_evaluation_beside_the_training_does_not_hide_its_results(write, tmp_path):
    (tmp_path / "results.json").write_text('{"bbox": {"AP": 1.0}}')
    record = [
        {"command": "ssimkd train", "test": ["a"], "outcome": "finished", "ended": "2026-01-02"},
        {"command": "ssimkd eval", "test": ["b"], "outcome": "finished", "ended": "2026-01-01"},
    ]
    record[1]["evaluates"] = True
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert write("DATASETS.TEST", ("a",)).results == {"bbox": {"AP": 1.0}}


def test_the_training_is_described_with_its_images_without_labels(write, tmp_path):
    logged = {"iteration": 9, "total_loss": 1, "ssim_kd_loss": 1}
    (tmp_path / "metrics.json").write_text(json.dumps(logged))
    data = ("DATASETS.TRAIN", ("a[:10%]",), "DATASETS.UNLABELED", ("b", "c"))
    expected = "a[:10%], and without labels b, c, 10 iterations of 4 + 2 images"
    opts = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.IMS_PER_BATCH_UNLABELED")
    assert write(*data, *opts, 2).trained == expected
    assert write(*data, *opts, 0).trained == "a[:10%], 10 iterations of 4 images"


def test_a_record_has_every_command_with_its_folder_and_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", "a b.yaml"])
    with record_run(str(tmp_path), []):
        (running,) = read_record(str(tmp_path))
        assert running["ended"] is None and "or was killed" in end_of(running)
    for error in (KeyError("x"), SystemExit(75), SystemExit(130), KeyboardInterrupt()):
        with pytest.raises(type(error)), record_run(str(tmp_path), []):
            raise error
    first, second, *stopped, at_once = read_record(str(tmp_path))
    assert first["command"] == "python train_net.py --config-file 'a b.yaml'"
    assert first["folder"] == os.getcwd()
    assert first["started"] <= first["ended"] <= second["started"]
    assert end_of(first).startswith("finished, ")
    assert end_of(second).startswith("failed: KeyError: 'x', ")
    assert all(re.match("stopped, .*; --resume continues it$", end_of(entry)) for entry in stopped)
    assert end_of(at_once).startswith("stopped at once, without a checkpoint")
    assert first["versions"]["torch"] == torch.__version__.split("+")[0]
