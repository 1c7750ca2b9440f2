"""Measures the memory that a call takes."""

from pathlib import Path
from typing import Callable, Optional

import torch


def resident(key: str) -> int:
    """Memory of this process in bytes: VmRSS is the present value, VmHWM the largest so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_of(call: Callable[[], object], device: str) -> Optional[int]:
    """Peak memory of a call beyond the memory held before it, in bytes; None if it is not known."""
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
    clear.write_text("5")  # sets VmHWM to VmRSS
    call()
    return resident("VmHWM") - before
