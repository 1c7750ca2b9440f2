"""What `make bench` computes from its measurements."""

import json
import mmap

import bench
import bench_growth
import bench_loss
import bench_step
import bench_teacher
import gpu_check
import pytest
import torch
from bench_loss import loss_table
from memory import peak_of, resident
from ssimkd import ConfigError
from ssimkd.utils.measure import interleave

SHAPES = "configs/shapes/ssimkd.yaml"
SMALL = ["--loss", "--size", "64", "64", "--levels", "p4", "--channels", "2"]


def test_implementations_take_turns_and_the_first_call_does_not_count():
    calls, now = [], 0.0
    costs = {"a": iter([100.0, 1.0, 5.0, 2.0]), "b": iter([100.0, 7.0, 8.0, 30.0])}

    def call(name):
        def step():
            nonlocal now
            calls.append(name)
            now += next(costs[name])

        return step

    medians = interleave({n: call(n) for n in costs}, 3, lambda: now)
    assert calls == ["a", "b"] * 4
    assert medians == {"a": 2.0, "b": 8.0}


def test_the_table_divides_by_the_baseline():
    def result(seconds, sets):
        times = {"p5": seconds, "p6": seconds / 2, "sum": 1.5 * seconds}
        return {"seconds": times, "forward": seconds / 4, "deviation": 2e-7, "extra_memory": sets}

    results = {"ssimkd": result(0.1, 1.25), "pytorch-msssim": result(0.4, None)}
    head, _, own, baseline = loss_table(results).splitlines()
    assert head.startswith(
        "|  | speed at p5 | speed at p6 | speed in sum | speed of the forward alone |"
    )
    assert own == "| ssimkd | 4.00 | 4.00 | 4.00 | 4.00 | 150 | 1.2 | 2e-07 |"
    assert baseline == "| pytorch-msssim | 1.00 | 1.00 | 1.00 | 1.00 | 600 | - | 2e-07 |"


def fresh_memory(size):
    """Memory of `size` bytes from the system: a tensor may reuse what an earlier one has freed."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.float32).fill_(1)


def test_memory_is_that_of_what_a_loss_keeps():
    size, before = 2**28, resident("VmRSS")
    held = fresh_memory(size)
    assert abs(resident("VmRSS") - before - held.nbytes) < 2**25
    # given back before the call ends, and still seen
    peak = peak_of(lambda: fresh_memory(2 * size).sum(), "cpu")
    assert abs(peak - 2 * size) < 2**25


def test_a_wrong_argument_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--device", "cpu"])
    assert "choose a part: --loss, --step, --growth" in capsys.readouterr().err
    arguments = [*SMALL, "--implementations", "fussim", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="^error: --implementations: none of them is installed"):
        bench.main(arguments)


def test_an_implementation_that_cannot_take_a_level_is_named(monkeypatch):
    def fail(student, teacher):
        raise RuntimeError("Padding size should be less\nand more")

    monkeypatch.setitem(bench_loss.LOSSES, "kornia", lambda: fail)
    args = bench.parse([*SMALL, "--implementations", "kornia"])
    expected = "--size, --levels: kornia on p4, 4 x 4 cells: RuntimeError: Padding size"
    with pytest.raises(ConfigError, match=expected):
        bench_loss.bench_loss(args)


def test_a_step_leaves_the_weights_and_the_loss_gets_the_maps_of_the_step():
    one = bench_step.Bench(SHAPES, (64, 96), 1, ["ssim", "mgd"], "cpu")
    assert one.distillers["ssim"].teacher is one.distillers["mgd"].teacher
    before = [p.detach().clone() for p in one.model.parameters()]
    one.step()
    plain = one.model.backbone.fpn_output2.weight.grad.clone()
    one.step("ssim")
    assert not torch.equal(one.model.backbone.fpn_output2.weight.grad, plain)
    after = list(one.model.parameters())[: len(before)]
    assert all(map(torch.equal, before, after))
    student, teacher = one.pair("ssim")
    assert student["p3"].shape == teacher["p3"].shape == (1, 64, 8, 12)
    one.compare("ssim", student, teacher)
    assert all(m.grad.abs().max() > 0 for m in student.values())
    torch.testing.assert_close(one.teach()["p3"], teacher["p3"], rtol=1e-4, atol=1e-5)


def test_the_steps_share_and_ratio(monkeypatch):
    def seconds(calls, repeats, clock):
        times = {bench_step.STUDENT: 3.0, bench_step.TEACHER: 1.0}
        return {name: times.get(name, 4.2 if "," in name else 0.21) for name in calls}

    monkeypatch.setattr(bench_step, "interleave", seconds)
    arguments = ["--step", "--config", SHAPES, "--size", "64", "64", "--losses", "ssim"]
    results = bench_step.bench_step(bench.parse(arguments))
    found = results["distilled, ssim"]
    assert found["ratio"] == pytest.approx(1.05) and found["share_of_loss"] == pytest.approx(0.05)
    row = bench_step.step_table(results).splitlines()[-1]
    assert row.startswith("| distilled, ssim | 4.2 | 5.0 | 1.050 | ")


def test_growth_is_written_as_a_table_and_measures_a_point_once(monkeypatch, tmp_path):
    measured = []

    def seconds(args, point):
        measured.append(point)
        cost = point["size"][0] * point["size"][1] * point["images"] * point["processes"] / 4096
        return {"loss": cost / 1000, "student alone": cost, "distilled step": 2 * cost}

    monkeypatch.setattr(bench_growth, "measure_point", seconds)
    bench.main(["--growth", "--growth-size", "64", "64", "--out", str(tmp_path)])
    assert len(measured) == 6
    results = json.loads((tmp_path / "growth.json").read_text())["results"]
    assert [x["seconds"]["loss"] for x in results["image area"]] == [0.001, 0.002, 0.004]
    text = (tmp_path / "growth.md").read_text()
    assert "| 64 x 128 pixels | 2 (2.00) | 2000 (2.00) | 4000 (2.00) |" in text
    assert "| 2 processes | 2 (2.00) |" in text


def test_two_processes_take_a_step_together():
    arguments = ["--growth", "--config", SHAPES, "--growth-size", "64", "64"]
    args = bench.parse([*arguments, "--step-repeats", "1"])
    seconds = bench_growth.measure_point(args, dict(size=(64, 64), images=1, processes=2))
    assert set(seconds) == {"loss", "student alone", "distilled step"}
    assert all(value > 0 for value in seconds.values())


def test_a_teacher_in_float32_has_the_detectors_own_maps(capsys):
    bench_teacher.main(["--repeats", "1", "--images", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    maps = {row[0].strip("| "): [float(cell.strip("| ")) for cell in row[2:]] for row in rows[2:5]}
    assert max(maps["float32"]) < 1e-5 < min(maps["bfloat16"]) < max(maps["bfloat16"]) < 1e-2


def test_the_check_for_gpus_runs_without_one_on_small_detectors(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "check"
    gpu_check.main(["--small", "--losses", "ssim", "icd", "kd", "--out", str(out)])
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["losses"]["ssim"] == found["losses"]["icd"] == found["losses"]["kd"] == "passed"
    assert found["step"]["distilled, ssim, bfloat16"]["seconds"] > 0
    assert "no GPU" in found["kernels"]["left out"]
    text = out.with_suffix(".md").read_text()
    assert "| distilled, ssim, float32 | seconds: " in text
    with pytest.raises(SystemExit, match="there is no GPU"):
        gpu_check.main(["--out", str(out)])


def test_a_check_that_fails_is_named_after_the_other_parts(tmp_path, monkeypatch):
    def fail(args):
        raise AssertionError("p3 differs")

    monkeypatch.setitem(gpu_check.PARTS, "losses", fail)
    monkeypatch.setitem(gpu_check.PARTS, "step", lambda args: {"a": 1.0})
    with pytest.raises(SystemExit, match="^error: failed: losses"):
        gpu_check.main(["--small", "--parts", "losses", "step", "--out", str(tmp_path / "check")])
    assert "p3 differs" in (tmp_path / "check.md").read_text()
    assert "| a | 1 |" in (tmp_path / "check.md").read_text()
