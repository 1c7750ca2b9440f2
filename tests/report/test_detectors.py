"""The names of the detectors of a report."""

import pytest
from ssimkd.report.detectors import labels_of


@pytest.mark.parametrize(
    "groups, labels",
    [
        ([["a/student"], ["b/vanilla"]], ["student", "vanilla"]),
        ([["ssim_seed1", "ssim_seed2"], ["vanilla3"]], ["ssim", "vanilla3"]),
        ([["ssim/seed1"], ["vanilla/seed1"]], ["ssim/seed1", "vanilla/seed1"]),
        ([["ssim/seed1", "ssim/seed2"], ["vanilla/seed1", "vanilla/seed2"]], ["ssim", "vanilla"]),
        ([["ssim_seed1", "ssim_seed2"], ["ssim"]], ["ssim_seed1", "ssim"]),
        ([["runs/a/x"], ["runs/b/x"], ["runs/y"]], ["a/x", "b/x", "runs/y"]),
    ],
)
def test_a_name_tells_a_run_from_the_others(groups, labels):
    assert labels_of(groups) == labels
