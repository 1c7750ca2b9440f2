"""The checks accept right options, and name wrong ones."""

import math

import numpy as np
import pytest
from ssimkd.utils.validate import check_coefficients, check_integers, check_positive, check_switches

NO_NUMBERS = (math.inf, math.nan, "1", None, True)


@pytest.mark.parametrize(
    "check, right, wrong",
    [
        (check_switches, (True, False), ("no", "True", 0, 1, None)),
        (check_integers, (0, 7, np.int64(3)), (-1, 7.0, 7.5, *NO_NUMBERS)),
        (check_coefficients, (0, 0.0, 1e-9, np.float32(2)), (-1, -1e-9, *NO_NUMBERS)),
        (check_positive, (1e-9, 3), (0, 0.0, -1, *NO_NUMBERS)),
    ],
)
def test_what_a_check_accepts_and_names(check, right, wrong):
    for value in right:
        check(option=value)
    for value in wrong:
        with pytest.raises(ValueError, match=f"^option must be .*, got {value!r}$"):
            check(other=right[0], option=value)


def test_the_least_integer():
    check_integers(1, option=1)
    with pytest.raises(ValueError, match="option must be an integer >= 1, got 0"):
        check_integers(1, option=0)
