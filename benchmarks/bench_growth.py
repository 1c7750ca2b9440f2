"""Part 3 of bench.py: how the times of the SSIM loss and of a distilled step grow."""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Dict, List

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_step import STUDENT, Bench
from ssimkd.utils.measure import Call, clock_of, interleave, markdown
from torch.nn.parallel import DistributedDataParallel

LOSS, DISTILLED = "loss", "distilled step"


def points(args: argparse.Namespace) -> Dict[str, List[Dict[str, Any]]]:
    """Quantity that grows -> the settings to measure, which start from the same base."""
    height, width = args.growth_size
    base = dict(size=(height, width), images=1, processes=1)
    return {
        "image area": [
            dict(base, size=(height * f, width * g)) for f, g in ((1, 1), (1, 2), (2, 2))
        ],
        "images": [dict(base, images=n) for n in (1, 2, 4)],
        "processes": [dict(base, processes=n) for n in range(1, args.processes + 1)],
    }


def measure(args: argparse.Namespace, point: Dict[str, Any], rank: int = 0) -> Dict[str, float]:
    """Seconds of the loss, of the student's step and of the distilled step in this process."""
    device = f"cuda:{rank}" if args.device == "cuda" else args.device
    bench = Bench(args.config, point["size"], point["images"], ["ssim"], device, args.opts)
    if point["processes"] > 1:
        bench.run = DistributedDataParallel(bench.model, broadcast_buffers=False)
    calls: Dict[str, Call] = {
        LOSS: partial(bench.compare, "ssim", *bench.pair("ssim")),
        STUDENT: bench.step,
        DISTILLED: partial(bench.step, "ssim"),
    }
    return interleave(calls, args.step_repeats, clock_of(device, args.cpu_time))


def work(rank: int, args: argparse.Namespace, point: Dict[str, Any], folder: str) -> None:
    """One of several processes. The first one writes its measurement."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if args.device == "cuda" else "gloo"
    store, size = f"file://{folder}/store", point["processes"]
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
    seconds = measure(args, point, rank)
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def measure_point(args: argparse.Namespace, point: Dict[str, Any]) -> Dict[str, float]:
    """Runs :func:`measure` in the number of processes of the point."""
    if point["processes"] == 1:
        return measure(args, point)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (args, point, folder), nprocs=point["processes"])
        return json.loads(Path(folder, "seconds.json").read_text())


def bench_growth(args: argparse.Namespace) -> Dict:
    """Seconds at each point. A point of several series is measured once."""
    known: Dict[str, Dict[str, float]] = {}
    results: Dict[str, List[Dict]] = {}
    for what, series in points(args).items():
        results[what] = []
        for point in series:
            key = json.dumps(point)
            if key not in known:
                known[key] = measure_point(args, point)
                print(f"{what}: {point} done", flush=True)
            results[what].append({"point": point, "seconds": known[key]})
    return results


def growth_table(results: Dict) -> str:
    """A row for each point in Markdown. In brackets is the ratio to the series' first point."""
    rows = []
    for what, series in results.items():
        first = series[0]["seconds"]
        for entry in series:
            times = (
                f"{1000 * s:.4g} ({s / first[name]:.2f})" for name, s in entry["seconds"].items()
            )
            point = entry["point"]
            size = "{} x {} pixels".format(*point["size"])
            rows.append([size if what == "image area" else f"{point[what]} {what}", *times])
    return markdown(["", *(f"{name}, ms" for name in (LOSS, STUDENT, DISTILLED))], rows)
