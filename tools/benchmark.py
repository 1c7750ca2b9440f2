#!/usr/bin/env python
"""Times what distillation costs, and compares it with other implementations.

    python tools/benchmark.py --loss                          # as `make bench` does
    python tools/benchmark.py --loss --cpu-time               # on a machine that others use, too
    python tools/benchmark.py --loss --size 480 640 --levels p3 p4 p5 --repeats 9

Each part writes <out>/<part>.json, .md (a table) and .png (a plot). Times are medians over repeats
that take the implementations in turn, so that what slows the machine slows all of them; quote
their ratios, with the machine. What is not installed is named as absent.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Tuple, cast

import torch
from ssimkd.losses import Context, SSIMLoss
from ssimkd.normalize import normalize_maps
from ssimkd.ssim import ssim_loss
from torch import Tensor

Maps = Dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
STRIDES = {f"p{level}": 2**level for level in range(2, 7)}
OWN = "ssimkd"
# What times are divided by
BASELINE = "pytorch-msssim"


# --- implementations: name -> a loss of two maps in [0, 1], or an import error ---


def own(normalize: str) -> Loss:
    """This package's loss of one level, whose images fill it."""
    loss = SSIMLoss(normalize=normalize)

    def compare(student: Tensor, teacher: Tensor) -> Tensor:
        h, w = student.shape[2:]
        context = Context([(h, w)] * len(student), {"p0": 1})
        return loss({"p0": student}, {"p0": teacher}, context)["p0"]

    return compare


def pytorch_msssim() -> Loss:
    """11 x 11 window of sigma 1.5, without border."""
    from pytorch_msssim import ssim

    return lambda x, y: (1 - ssim(x, y, data_range=1.0)) / 2


def kornia() -> Loss:
    """The same window, reflected border."""
    from kornia.losses import ssim_loss as kornia_loss

    return lambda x, y: kornia_loss(x, y, 11)


def piq() -> Loss:
    """The same window, not separated; without border, and not scaled down."""
    from piq import ssim

    return lambda x, y: (1 - cast(Tensor, ssim(x, y, downsample=False))) / 2


def torchmetrics() -> Loss:
    """The same window, reflected border."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    return lambda x, y: (1 - cast(Tensor, ssim(x, y, data_range=1.0))) / 2


def normalised() -> Loss:
    """The baseline behind this package's normalisation."""
    loss = pytorch_msssim()
    return lambda x, y: loss(*normalize_maps(x, y, "minmax", "channel", None))


LOSSES: Dict[str, Callable[[], Loss]] = {
    OWN: lambda: own("none"),
    f"{OWN}, normalisation included": lambda: own("minmax"),
    f"{OWN}, plain autograd": lambda: ssim_loss,
    BASELINE: pytorch_msssim,
    f"{BASELINE}, normalisation included": normalised,
    "kornia": kornia,
    "piq": piq,
    "torchmetrics": torchmetrics,
}


def installed() -> Dict[str, Loss]:
    """The losses whose packages are there; names the others."""
    found = {}
    for name, make in LOSSES.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"absent: {name} ({error})")
    return found


# --- measuring ---


def make_maps(
    size: Tuple[int, int], images: int, channels: int, levels: List[str], device: str
) -> Tuple[Maps, Maps]:
    """Student (with gradient) and teacher maps of an FPN in [0, 1], alike in part.

    The images are padded to multiples of 32 pixels, as an FPN asks for.
    """
    generator = torch.Generator().manual_seed(0)
    student: Maps = {}
    teacher: Maps = {}
    for level in levels:
        h, w = (math.ceil(math.ceil(side / 32) * 32 / STRIDES[level]) for side in size)
        x, y = torch.randn(2, images, channels, h, w, generator=generator)
        for maps, m in ((student, x), (teacher, y.add_(x))):
            m -= m.amin((2, 3), keepdim=True)
            m /= m.amax((2, 3), keepdim=True)
            maps[level] = m.to(device)
        student[level].requires_grad_()
    return student, teacher


def interleave(
    calls: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
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


def gradient(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Forward and backward of a loss."""
    return torch.autograd.grad(loss(student, teacher), student)[0]


def deviation(loss: Loss, student: Tensor, teacher: Tensor) -> float:
    """Largest difference of a gradient to float64's, relative to the largest gradient."""
    exact = gradient(loss, student.detach().double().requires_grad_(), teacher.double())
    return float((gradient(loss, student, teacher) - exact).abs().max() / exact.abs().max())


def resident(key: str) -> int:
    """A memory figure of this process in bytes: VmRSS, what it holds now, or VmHWM, its most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def extra_memory(name: str, maps: tuple, threads: int) -> Optional[float]:
    """Most memory that a step on all levels takes beyond the maps, in sets of maps.

    Read from the kernel, so it is to be called in a process of its own. None but on Linux.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    torch.set_num_threads(threads)
    loss = LOSSES[name]()
    small = torch.rand(1, 16, 32, 32, requires_grad=True)
    gradient(loss, small, torch.rand(1, 16, 32, 32))  # loads the libraries
    student, teacher = make_maps(*maps)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most is what it holds now
    total = torch.stack([loss(student[level], teacher[level]) for level in student]).sum()
    total.backward()
    return (resident("VmHWM") - before) / sum(4 * m.numel() for m in student.values())


# --- part 1: the loss ---


def bench_loss(args: argparse.Namespace) -> Dict:
    """Forward and backward of SSIM, per level and in sum."""
    maps = (tuple(args.size), args.images, args.channels, args.levels, "cpu")
    student, teacher = make_maps(*maps)
    losses = installed()
    results: Dict[str, Dict] = {name: {"seconds": {}, "deviation": 0.0} for name in losses}
    for level, x in student.items():
        y = teacher[level]
        calls = {name: partial(gradient, f, x, y) for name, f in losses.items()}
        # the smaller, the more often: a run of a coarse level takes milliseconds
        repeats = args.repeats * (1 if x.numel() > 2**22 else 5)
        clock = time.process_time if args.cpu_time else time.perf_counter
        for name, seconds in interleave(calls, repeats, clock).items():
            results[name]["seconds"][level] = seconds
        part = slice(0, min(16, args.channels))
        for name, loss in losses.items():
            value = deviation(loss, x[:1, part].detach().requires_grad_(), y[:1, part])
            results[name]["deviation"] = max(results[name]["deviation"], value)
        print(f"{level}: {tuple(x.shape)} done", flush=True)
    del student, teacher
    for name, result in results.items():
        result["seconds"]["sum"] = sum(result["seconds"].values())
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result["sets"] = pool.apply(extra_memory, (name, maps, args.threads))
    return results


def loss_table(results: Dict) -> str:
    """Markdown: a row per implementation."""
    columns = list(next(iter(results.values()))["seconds"])
    base = results.get(BASELINE, results[OWN])["seconds"]
    head = [f"speed at {c}" if c != "sum" else "speed in sum" for c in columns]
    head += ["ms in sum", "extra memory, map sets", "deviation from float64"]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for name, result in results.items():
        cells = [f"{base[c] / result['seconds'][c]:.2f}" for c in columns]
        sets = "-" if result["sets"] is None else f"{result['sets']:.1f}"
        cells += [f"{1000 * result['seconds']['sum']:.0f}", sets, f"{result['deviation']:.0e}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def loss_plot(results: Dict, path: Path) -> None:
    """Speed per level and in sum, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    base = results.get(BASELINE, results[OWN])["seconds"]
    for i, (name, result) in enumerate(results.items()):
        positions = [j + (i - len(results) / 2) * 0.8 / len(results) for j in range(len(base))]
        speeds = [base[c] / result["seconds"][c] for c in base]
        axes.bar(positions, speeds, 0.8 / len(results), label=name, align="edge")
    axes.set_xticks(range(len(base)), list(base))
    axes.set_ylabel(f"speed, {BASELINE if BASELINE in results else OWN} = 1")
    axes.legend()
    figure.savefig(path)


def machine(threads: int) -> Dict[str, str]:
    """What a figure has to be quoted with."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    peers = [name for name in LOSSES if importlib.util.find_spec(name.replace("-", "_"))]
    versions = [f"{name} {metadata.version(name)}" for name in peers if name != OWN]
    return {
        "cpu": f"{cpu}, {os.cpu_count()} cores, {threads} used",
        "versions": ", ".join([f"torch {torch.__version__}", *versions]),
    }


# part -> what it measures, its table and its plot
PARTS = {"loss": (bench_loss, loss_table, loss_plot)}


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", action="store_true", help="SSIM, forward and backward")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), help="image, in pixels")
    parser.add_argument("--images", type=int, default=2, help="images of a batch")
    parser.add_argument("--channels", type=int, default=256, help="channels of each map")
    parser.add_argument("--levels", nargs="+", choices=STRIDES, default=list(STRIDES))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=5, help="runs of a large level, at least 3")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time, not the clock's")
    parser.add_argument("--out", type=Path, default=Path("output/benchmark"))
    args = parser.parse_args()
    chosen = [part for part in PARTS if getattr(args, part)]
    if not chosen:
        parser.error(f"choose a part: {', '.join('--' + part for part in PARTS)}")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for part in chosen:
        measure, table, plot = PARTS[part]
        results = measure(args)
        about = machine(args.threads)
        settings = {k: v for k, v in vars(args).items() if k not in (*PARTS, "out")}
        record = {"machine": about, "settings": settings, "results": results}
        (args.out / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n")
        text = f"{table(results)}\n\n{about['cpu']}; {about['versions']}\n"
        (args.out / f"{part}.md").write_text(text)
        plot(results, args.out / f"{part}.png")
        print(f"\n{text}\n{args.out / part}.json, .md, .png")


if __name__ == "__main__":
    main()
