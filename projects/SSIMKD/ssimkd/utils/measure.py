"""Measuring times, and writing the results as tables."""

import statistics
import time
from typing import Any, Callable, Dict, List, Mapping, Sequence, Union

import torch

Call = Callable[[], object]


def clock_of(device: Union[str, torch.device], cpu_time: bool = False) -> Callable[[], float]:
    """A clock in seconds of real time or, with `cpu_time`, of CPU time.

    On a GPU it waits until all work is done.
    """
    if torch.device(device).type == "cpu":
        return time.process_time if cpu_time else time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def interleave(
    calls: Mapping[Any, Call], repeats: int, clock: Callable[[], float]
) -> Dict[Any, float]:
    """Median seconds of each call. The calls take turns, and the first round does not count."""
    times: Dict[Any, List[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if repeat:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def mean_and_deviation(values: Sequence[float]) -> str:
    """The mean of several values +- their standard deviation. A single value stands alone."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} +- {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
