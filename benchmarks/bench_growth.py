"""Part 3 of bench.py: how the SSIM loss and a distilled step grow."""

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
    """What grows -> the settings to measure, the first the base."""
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
    """Seconds of the loss, of the student's step and of the distilled one, on this process."""
    device = f"cuda:{rank}" if args.device == "cuda" else args.device
    bench = Bench(args.config, point["size"], point["images"], ["ssim"], device, args.opts)
    if point["processes"] > 1:
        bench.run = DistributedDataParallel(bench.model, broadcast_buffers=False)
    calls: Dict[str, Call] = {
        LOSS: partial(bench.compare, "ssim", *bench.pair("ssim")),
        STUDENT: bench.step,
        DISTILLED: partial(bench.step, "ssim"),
    }
    return interleave(calls, args.growth_repeats, clock_of(device, args.cpu_time))


def work(rank: int, args: argparse.Namespace, point: Dict[str, Any], folder: str) -> None:
    """One of several processes; the first writes what it measured."""
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
    """As :func:`measure`, in as many processes as the point has."""
    if point["processes"] == 1:
        return measure(args, point)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (args, point, folder), nprocs=point["processes"])
        return json.loads(Path(folder, "seconds.json").read_text())


def bench_growth(args: argparse.Namespace) -> Dict:
    """Seconds at each point; one that stands in several series is measured once."""
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


def label(what: str, point: Dict[str, Any]) -> str:
    """A point's place in its series, such as "2 images"."""
    if what == "image area":
        return "{} x {} pixels".format(*point["size"])
    return f"{point[what]} {what}"


def growth_table(results: Dict) -> str:
    """Markdown: a row per point; how often the series' first point a time is stands in brackets."""
    rows = []
    for what, series in results.items():
        first = series[0]["seconds"]
        for entry in series:
            times = (
                f"{1000 * s:.4g} ({s / first[name]:.2f})" for name, s in entry["seconds"].items()
            )
            rows.append([label(what, entry["point"]), *times])
    return markdown(["", *(f"{name}, ms" for name in (LOSS, STUDENT, DISTILLED))], rows)
