"""Command line, clock, memory and tables of what is measured."""

import argparse
import statistics
import time
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Union

import torch

Call = Callable[[], object]


def positive(text: str) -> int:
    """A number of things on a command line, at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def clock_of(device: Union[str, torch.device], cpu_time: bool = False) -> Callable[[], float]:
    """Seconds so far: of the CPU or by the clock, on a GPU once all is done."""
    if torch.device(device).type == "cpu":
        return time.process_time if cpu_time else time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def interleave(
    calls: Mapping[str, Call], repeats: int, clock: Callable[[], float]
) -> Dict[str, float]:
    """Median seconds of each call, taken in turn, after one call that is not counted."""
    times: Dict[str, List[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if repeat:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def resident(key: str) -> int:
    """A memory figure of this process in bytes: VmRSS, what it holds now, or VmHWM, its most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_of(call: Call, device: str) -> Optional[int]:
    """Most bytes that a call takes beyond what is held before it. None where that is not told."""
    clear = Path("/proc/self/clear_refs")
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not clear.exists():
        call()
        return None
    before = resident("VmRSS")
    clear.write_text("5")  # the most is what it holds now
    call()
    return resident("VmHWM") - before


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
