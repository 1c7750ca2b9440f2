"""What `make bench` computes from its measurements."""

import importlib.util

import pytest
import torch
from conftest import ROOT

spec = importlib.util.spec_from_file_location("benchmark", ROOT / "tools/benchmark.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def test_implementations_take_turns_and_the_first_call_does_not_count():
    calls, now = [], 0.0
    costs = {"a": iter([100.0, 1.0, 5.0, 2.0]), "b": iter([100.0, 7.0, 8.0, 30.0])}

    def call(name):
        def step():
            nonlocal now
            calls.append(name)
            now += next(costs[name])

        return step

    medians = benchmark.interleave({n: call(n) for n in costs}, 3, lambda: now)
    assert calls == ["a", "b"] * 4
    assert medians == {"a": 2.0, "b": 8.0}


def test_the_table_divides_by_the_baseline():
    def result(seconds, sets):
        times = {"p5": seconds, "p6": seconds / 2, "sum": 1.5 * seconds}
        return {"seconds": times, "deviation": 2e-7, "sets": sets}

    results = {"ssimkd": result(0.1, 1.25), "pytorch-msssim": result(0.4, None)}
    head, _, own, baseline = benchmark.loss_table(results).splitlines()
    assert head.startswith("| | speed at p5 | speed at p6 | speed in sum | ms in sum |")
    assert own == "| ssimkd | 4.00 | 4.00 | 4.00 | 150 | 1.2 | 2e-07 |"
    assert baseline == "| pytorch-msssim | 1.00 | 1.00 | 1.00 | 600 | - | 2e-07 |"


def test_maps_are_those_of_an_fpn_in_0_to_1():
    student, teacher = benchmark.make_maps((800, 1333), 1, 1, ["p2", "p6"], "cpu")
    # 1333 is padded to 1344 = 4 * 336 = 64 * 21; 800 = 64 * 12.5
    assert student["p2"].shape == (1, 1, 200, 336) and teacher["p6"].shape == (1, 1, 13, 21)
    for maps in (*student.values(), *teacher.values()):
        assert (maps.min(), maps.max()) == (0, 1)


@pytest.mark.parametrize("normalize", ["none", "minmax"])
def test_own_loss_deviates_by_a_millionth_at_most(normalize):
    student, teacher = benchmark.make_maps((320, 416), 1, 4, ["p3"], "cpu")
    loss = benchmark.own(normalize)
    assert 0 < benchmark.deviation(loss, student["p3"], teacher["p3"]) < 1e-6


def test_memory_is_that_of_what_a_loss_keeps():
    before = benchmark.resident("VmRSS")
    held = torch.ones(64, 1024, 1024)  # 256 MiB
    assert abs(benchmark.resident("VmRSS") - before - 4 * held.numel()) < 2**25
