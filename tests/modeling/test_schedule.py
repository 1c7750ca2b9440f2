"""The factor of the weights, by iteration."""

import pytest
from ssimkd import ConfigError
from ssimkd.modeling.schedule import Schedule


def factors(iterations, **phases):
    return [Schedule(**phases).factor(iteration) for iteration in range(iterations)]


def test_a_weight_rises_stays_and_falls():
    assert factors(10, warmup=4, cooldown=2, stop=8) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5, 0, 0]
    assert factors(4, stop=2) == [1, 1, 0, 0]
    assert factors(4, warmup=2) == [0.5, 1, 1, 1]
    assert Schedule().factor(10**6) == 1
    # phases that meet: the smaller factor
    assert factors(4, warmup=4, cooldown=4, stop=4) == [0.25, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("stop", [0, 3, 20])
def test_it_has_ended_where_the_factor_is_0(stop):
    schedule = Schedule(cooldown=min(stop, 2), stop=stop)
    found = [i for i in range(10) if schedule.factor(i) == 0]
    assert found == [i for i in range(10) if schedule.ended(i)]
    assert schedule.iterations(10) == 10 - len(found)


@pytest.mark.parametrize(
    "phases, message",
    [
        (dict(warmup=-1), "MODEL.DISTILL.WARMUP_ITERS"),
        (dict(stop=1.5), "MODEL.DISTILL.STOP_ITER"),
        (dict(cooldown=5, stop=4), "COOLDOWN_ITERS is 5 and STOP_ITER is 4"),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(phases, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**phases)
