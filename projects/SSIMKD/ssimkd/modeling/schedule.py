"""The factor of all distillation weights, by iteration."""

from dataclasses import astuple, dataclass

from ssimkd.errors import ConfigError
from ssimkd.utils.validate import check_integers


@dataclass(frozen=True)
class Schedule:
    """The factor grows linearly over the first `warmup` iterations, stays at 1, and falls linearly
    to 0 over the last `cooldown` iterations before `stop`.

    Attributes:
        warmup, cooldown (int): numbers of iterations; 0: there is no such phase.
        stop (int): the first iteration in which the factor is 0; 0: there is none.

    Raises:
        ConfigError: a number is out of its range.
    """

    warmup: int = 0
    cooldown: int = 0
    stop: int = 0

    def __post_init__(self) -> None:
        keys = ("WARMUP_ITERS", "COOLDOWN_ITERS", "STOP_ITER")
        check_integers(**{f"MODEL.DISTILL.{key}": value for key, value in zip(keys, astuple(self))})
        if self.cooldown > self.stop:
            raise ConfigError(
                f"MODEL.DISTILL.COOLDOWN_ITERS is {self.cooldown} and STOP_ITER is {self.stop}: "
                "the weights fall before STOP_ITER, so COOLDOWN_ITERS cannot be larger"
            )

    def ended(self, iteration: int) -> bool:
        """Whether the factor is 0 from here on; iterations count from 0."""
        return bool(self.stop) and iteration >= self.stop

    def iterations(self, of_the_run: int) -> int:
        """In how many iterations of a run the factor is above 0."""
        return min(of_the_run, self.stop or of_the_run)

    def factor(self, iteration: int) -> float:
        """The factor in an iteration, in [0, 1]."""
        factor = min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0
        if self.stop:
            factor = min(factor, max(0.0, (self.stop - iteration) / max(self.cooldown, 1)))
        return factor
