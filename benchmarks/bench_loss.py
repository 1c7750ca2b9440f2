"""Part 1 of bench.py: the SSIM loss compared with other implementations."""

import argparse
import math
import multiprocessing
from functools import partial
from typing import Callable, Dict, List, Optional, Tuple, cast

import torch
from memory import peak_of
from ssimkd import ConfigError
from ssimkd.errors import as_config_error
from ssimkd.ssim import ssim_loss
from ssimkd.ssim.normalize import normalize_maps
from ssimkd.utils.measure import clock_of, interleave, markdown
from torch import Tensor

Maps = Dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
STRIDES = {f"p{level}": 2**level for level in range(2, 7)}
OWN = "ssimkd"
BASELINE = "pytorch-msssim"  # the table shows speeds relative to it


# Each function below returns a loss of two maps in [0, 1], or raises ImportError. All of them use
# a Gaussian window of 11 x 11 cells with sigma 1.5.


def own(backend: str, normalize: str = "none") -> Loss:
    """The loss of this package."""
    return partial(ssim_loss, backend=backend, normalize=normalize)


def pytorch_msssim() -> Loss:
    """Leaves out the border."""
    from pytorch_msssim import ssim

    return lambda x, y: (1 - ssim(x, y, data_range=1.0)) / 2


def kornia() -> Loss:
    """Reflects the border."""
    from kornia.losses import ssim_loss as kornia_loss

    return lambda x, y: kornia_loss(x, y, 11)


def piq() -> Loss:
    """Leaves out the border. Its filter is not separated."""
    from piq import ssim

    return lambda x, y: (1 - cast(Tensor, ssim(x, y, downsample=False))) / 2


def torchmetrics() -> Loss:
    """Reflects the border."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    return lambda x, y: (1 - cast(Tensor, ssim(x, y, data_range=1.0))) / 2


def normalised() -> Loss:
    """The baseline after the normalisation of this package."""
    loss = pytorch_msssim()
    return lambda x, y: loss(*normalize_maps(x, y, "minmax", "channel", None))


def fussim() -> Loss:
    """A CUDA kernel with zeros around the map, which forms the gradient in the forward."""
    from fussim import fused_ssim as ssim

    return lambda x, y: (1 - cast(Tensor, ssim(x, y))) / 2


LOSSES: Dict[str, Callable[[], Loss]] = {
    OWN: lambda: own("auto"),
    f"{OWN}, minmax": lambda: own("auto", "minmax"),
    f"{OWN}, analytic": lambda: own("analytic"),
    f"{OWN}, analytic, minmax": lambda: own("analytic", "minmax"),
    f"{OWN}, definition": lambda: own("definition"),
    BASELINE: pytorch_msssim,
    f"{BASELINE}, minmax": normalised,
    "kornia": kornia,
    "piq": piq,
    "torchmetrics": torchmetrics,
    "fussim": fussim,
}
ON_GPU = ("fussim",)  # kernels for float32 alone, with border "zero"


def installed(device: str, wanted: Optional[List[str]]) -> Dict[str, Loss]:
    """The wanted losses whose packages are installed; None stands for all. Prints the others.

    Raises:
        ConfigError: none of the packages is installed.
    """
    found = {}
    for name in wanted or LOSSES:
        try:
            if name in ON_GPU and device == "cpu":
                raise ImportError("it needs --device cuda")
            found[name] = LOSSES[name]()
        except ImportError as error:
            print(f"not installed: {name} ({error})")
    if not found:
        raise ConfigError("--implementations: none of them is installed")
    return found


def make_maps(
    size: Tuple[int, int], images: int, channels: int, levels: List[str], device: str
) -> Tuple[Maps, Maps]:
    """Correlated student and teacher maps of an FPN in [0, 1]. The student's require gradient.

    The images are padded to multiples of 32 pixels, as an FPN needs it.
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


def gradient(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """Forward and backward of a loss."""
    return torch.autograd.grad(loss(student, teacher), student)[0]


@torch.no_grad()
def forward(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """The value without gradient."""
    return loss(student, teacher)


def deviation(name: str, loss: Loss, student: Tensor, teacher: Tensor) -> float:
    """Largest error of a gradient compared with float64, relative to the largest gradient."""
    known = partial(ssim_loss, border="zero") if name in ON_GPU else loss
    exact = gradient(known, student.detach().double().requires_grad_(), teacher.double())
    return float((gradient(loss, student, teacher) - exact).abs().max() / exact.abs().max())


def extra_memory(name: str, maps: tuple, threads: int) -> Optional[float]:
    """Peak memory of a step on all levels beyond the maps, in multiples of the maps' memory.

    The operating system reports the peak of a whole process, so this needs a process of its own.
    """
    torch.set_num_threads(threads)
    loss = LOSSES[name]()
    device = maps[-1]
    small = torch.rand(1, 16, 32, 32, requires_grad=True, device=device)
    gradient(loss, small, torch.rand(1, 16, 32, 32, device=device))  # loads libraries
    student, teacher = make_maps(*maps)

    def step() -> None:
        total = torch.stack([loss(student[level], teacher[level]) for level in student]).sum()
        total.backward()

    peak = peak_of(step, device)
    return None if peak is None else peak / sum(4 * m.numel() for m in student.values())


def bench_loss(args: argparse.Namespace) -> Dict:
    """Times of forward and backward by level and in sum, and of the forward alone."""
    maps = (tuple(args.size), args.images, args.channels, args.levels, args.device)
    student, teacher = make_maps(*maps)
    losses = installed(args.device, args.implementations)
    results: Dict[str, Dict] = {
        name: {"seconds": {}, "forward": 0.0, "deviation": 0.0} for name in losses
    }
    for level, x in student.items():
        y = teacher[level]
        part = slice(0, min(16, args.channels))
        for name, loss in losses.items():
            with as_config_error(
                f"--size, --levels: {name} on {level}, {x.shape[2]} x {x.shape[3]} cells", Exception
            ):
                value = deviation(name, loss, x[:1, part].detach().requires_grad_(), y[:1, part])
            results[name]["deviation"] = max(results[name]["deviation"], value)
        calls = {name: partial(gradient, f, x, y) for name, f in losses.items()}
        # A call on a coarse level takes milliseconds, so it is repeated more often.
        repeats = args.repeats * (1 if x.numel() > 2**22 else 5)
        clock = clock_of(args.device, args.cpu_time)
        for name, seconds in interleave(calls, repeats, clock).items():
            results[name]["seconds"][level] = seconds
        calls = {name: partial(forward, f, x, y) for name, f in losses.items()}
        for name, seconds in interleave(calls, repeats, clock).items():
            results[name]["forward"] += seconds
        print(f"{level}: {tuple(x.shape)} done", flush=True)
    del student, teacher
    for name, result in results.items():
        result["seconds"]["sum"] = sum(result["seconds"].values())
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result["extra_memory"] = pool.apply(extra_memory, (name, maps, args.threads))
    return results


def base_of(results: Dict) -> str:
    """The implementation that the speeds are relative to."""
    return next((name for name in (BASELINE, OWN) if name in results), next(iter(results)))


def loss_table(results: Dict) -> str:
    """The table in Markdown, with a row for each implementation."""
    base, base_forward = (results[base_of(results)][key] for key in ("seconds", "forward"))
    columns = list(base)
    head = [f"speed at {c}" if c != "sum" else "speed in sum" for c in columns]
    head += [
        "speed of the forward alone",
        "ms in sum",
        "extra memory, map sets",
        "deviation from float64",
    ]
    rows = []
    for name, result in results.items():
        cells = [f"{base[c] / result['seconds'][c]:.2f}" for c in columns]
        memory = "-" if result["extra_memory"] is None else f"{result['extra_memory']:.1f}"
        cells.append(f"{base_forward / result['forward']:.2f}")
        cells += [f"{1000 * result['seconds']['sum']:.0f}", memory, f"{result['deviation']:.0e}"]
        rows.append([name, *cells])
    return markdown(["", *head], rows)
