"""The arithmetic of docs/performance.md."""

from itertools import product

import pytest
import scaling


def test_a_ring_of_two_sends_everything_once_each_way():
    assert scaling.all_reduce(100.0, 2, bandwidth=50.0, latency=1.0) == 2 * (100 / 2 / 50 + 1)
    assert scaling.all_reduce(100.0, 1, bandwidth=50.0, latency=1.0) == 0
    many = scaling.all_reduce(100.0, 10**6, bandwidth=50.0, latency=0.0)
    assert many == pytest.approx(2 * 100 / 50, rel=1e-5)  # each byte out and back


def test_what_does_not_hide_behind_the_backward_pass():
    work = scaling.Work(4 * scaling.BUCKET, 0, 0, 0, 0, 0)
    one = scaling.all_reduce(scaling.BUCKET, 8, 1e9, 0)
    assert scaling.exposed(work, 8, 1e9, 0, backward=100) == one  # the last bucket
    assert scaling.exposed(work, 8, 1e9, 0, backward=0) == 4 * one
    assert scaling.exposed(work, 8, 1e9, 0, backward=one) == 3 * one


def test_the_slowest_gpu(monkeypatch):
    monkeypatch.setattr(scaling, "SHORT_SIDES", (2, 3, 5))
    squares = [[x**2 for x in sides] for sides in product((2, 3, 5), repeat=2 * scaling.IMAGES)]
    of_two = sum(map(max, squares)) / len(squares)
    of_one = sum(max(x[: scaling.IMAGES]) for x in squares) / len(squares)
    assert scaling.slowest(2) == pytest.approx(of_two / of_one)
    assert scaling.slowest(1) == 1


def test_the_zoos_faster_rcnn():
    work = scaling.count("configs/ssimkd_R50.yaml")
    # 41.70 M parameters less the frozen stem and res2: 9408 and 212992
    assert work.gradients == 4 * (41_699_936 - 9_408 - 212_992)
    # the backward pass computes two products for each of the forward's, less in what is frozen
    assert 1.6 < work.backward / work.forward < 2
    # R101 has 23 blocks in res4 where R50 has 6, of 1024 -> 256 -> 256 -> 1024 channels
    block = 2 * (1024 * 256 + 9 * 256 * 256 + 256 * 1024) * 50 * 84 * scaling.IMAGES
    assert work.teacher_forward - 17 * block == pytest.approx(574.1e9, rel=1e-4)  # R50's own
