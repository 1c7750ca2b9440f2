"""Checks and times what runs on a GPU: kernels, losses, training step. Reserve eight minutes.

    python benchmarks/gpu_check.py                        # writes output/gpu_check.json and .md
    compute-sanitizer --tool memcheck python benchmarks/gpu_check.py --small --parts kernels
    compute-sanitizer --tool racecheck python benchmarks/gpu_check.py --small --parts kernels
    TRITON_INTERPRET=1 python benchmarks/gpu_check.py --small  # without a GPU, takes minutes

    kernels   the Triton kernels of SSIM against float64, in a CUDA graph, and their times
    losses    a training step with every loss, and that SSIM's waits for nothing
    step      time and memory of a step of configs/ssimkd_R50.yaml, 800 x 1333 pixels, in float32
              and in mixed precision, and the teacher through torch.compile

A check that fails is an error, after the other parts. Times are medians; what is compared takes
turns. --small takes small maps and detectors, and measures no kernels.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple
from unittest.mock import patch

import torch
from bench_step import Bench
from memory import peak_of
from ssimkd.engine.run_record import commit
from ssimkd.errors import one_line
from ssimkd.losses import KD_LOSS_REGISTRY
from ssimkd.ssim import gpu, ssim_loss
from ssimkd.teacher.network import TeacherNetwork
from ssimkd.utils.measure import clock_of, interleave, markdown
from torch import Tensor

LEVELS = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
SMALL = [(5, 37), (7, 6)]
SHAPES, R50 = "configs/shapes/ssimkd.yaml", "configs/ssimkd_R50.yaml"
RETINANET = "configs/ssimkd_retinanet_R18.yaml"
LIMIT = 1e-6  # error of a float32 gradient compared with float64, relative to its largest element

Maps = List[Tuple[Tensor, Tensor]]
Step = Callable[[], Tuple[Tensor, ...]]


def pyramid(levels, channels: int, device: str, dtype=torch.float32) -> Maps:
    """Student and teacher maps of two images, for each level."""
    generator = torch.Generator(device).manual_seed(0)
    pairs = []
    for size in levels:
        x, noise = (
            torch.randn(2, channels, *size, device=device, generator=generator) for _ in range(2)
        )
        pairs.append((x.to(dtype).requires_grad_(), ((x.detach() + noise) / 2).to(dtype)))
    return pairs


def gradients(pairs: Maps, backend: str = "triton", **options) -> Tuple[Tensor, ...]:
    """The loss of each level, then the gradient of their sum with respect to each student map."""
    options = {"normalize": "minmax", **options}
    values = [ssim_loss(x, y, backend=backend, **options) for x, y in pairs]
    return (*values, *torch.autograd.grad(torch.stack(values).sum(), [x for x, _ in pairs]))


# Each check raises AssertionError if it fails, and may return the figures that it measured.


def check_accuracy(levels, channels: int, device: str) -> Dict[str, float]:
    """Compares loss and gradient with float64 for several windows, borders and exponents."""
    found = {}
    cases = itertools.product((3, 5, 7, 9, 11), ("renormalize", "zero"), (1.0, 0.0))
    for window_size, border, alpha in cases:
        options: Dict[str, Any] = dict(window_size=window_size, border=border)
        options["exponents"] = (alpha, 1.0, 1.0)
        worst = 0.0
        for x, y in pyramid(levels, channels, device):
            exact = [(x.detach().double().requires_grad_(), y.double())]
            loss, gradient = gradients([(x, y)], **options)
            known_loss, known = gradients(exact, "definition", **options)
            deviation = (gradient - known).abs().max() / known.abs().max()
            worst = max(worst, deviation.item(), (loss - known_loss).abs().item())
        found[f"window {window_size}, {border}, alpha {alpha:g}"] = worst
    # The error is larger on a few cells, where some windows have hardly any variance.
    assert max(found.values()) <= (LIMIT if levels is LEVELS else 4 * LIMIT), found
    return found


def check_types(levels, channels: int, device: str) -> Dict[str, float]:
    """In half precision the only error is the rounding of the gradient."""
    found: Dict[str, float] = {}
    for dtype, limit in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
        for x, y in pyramid(levels, channels, device, dtype):
            scale = x[0].numel()  # without a scale, float16 cannot hold the gradient of a mean
            results = []
            for student in (x, x.detach().float().requires_grad_()):
                loss = ssim_loss(student, y, normalize="minmax", backend="triton") * scale
                results.append(torch.autograd.grad(loss, student)[0])
            half, single = results
            deviation = ((half - single).abs().max() / single.abs().max()).item()
            found[str(dtype)] = max(deviation, found.get(str(dtype), 0.0))
        assert found[str(dtype)] <= limit, found
    return found


def check_padding(levels, channels: int, device: str) -> None:
    """The loss of an image is the same in a corner of a larger map that is NaN elsewhere."""
    for x, y in pyramid(levels, channels, device):
        height, width = x.shape[2:]
        sizes = [((height + 1) // 2, width), (height, (width + 1) // 2)]
        padded = [m.detach().clone() for m in (x, y)]
        known, values = torch.zeros_like(padded[0]), []
        for n, (h, w) in enumerate(sizes):
            for m in padded:
                m[n, :, h:], m[n, :, :, w:] = float("nan"), float("nan")
            alone = x[n : n + 1, :, :h, :w].detach().requires_grad_()
            value, gradient = gradients([(alone, y[n : n + 1, :, :h, :w])])
            known[n, :, :h, :w] = gradient[0] / 2
            values.append(value)
        loss, gradient = gradients([(padded[0].requires_grad_(), padded[1])], sizes=sizes)
        torch.testing.assert_close(loss, torch.stack(values).mean())
        torch.testing.assert_close(gradient, known, rtol=1e-5, atol=known.max().item() / 1e5)


def check_nan(levels, channels: int, device: str) -> None:
    """NaN inside an image makes the loss NaN, with luminance and without."""
    for x, y in pyramid(levels, channels, device):
        for spoiled, alpha in itertools.product(range(2), (1.0, 0.0)):
            student, teacher = maps = [m.detach().clone() for m in (x, y)]
            maps[spoiled][0, 0, 0, 0] = float("nan")
            pair = (student.requires_grad_(), teacher)
            options: Dict[str, Any] = dict(normalize="none", exponents=(alpha, 1.0, 1.0))
            assert gradients([pair], **options)[0].isnan()


def check_determinism(levels, channels: int, device: str) -> None:
    """Equal inputs give bitwise equal results."""
    pairs = pyramid(levels, channels, device)
    first = gradients(pairs)
    for _ in range(5):
        assert all(a.equal(b) for a, b in zip(first, gradients(pairs)))


def check_extremes(levels, channels: int, device: str) -> None:
    """Cells with the same extreme value share the gradient as in the definition."""
    for x, y in pyramid(levels, channels, device):
        tied = x.detach().clamp(-1, 1).requires_grad_()
        exact = tied.detach().double().requires_grad_()
        _, gradient = gradients([(tied, y)])
        _, known = gradients([(exact, y.double())], "definition")
        assert (gradient - known).abs().max() <= 1e-5 * known.abs().max()


def check_capture(levels, channels: int, device: str) -> None:
    """A CUDA graph computes the same on new maps as an eager step, so nothing waits for the GPU."""
    pairs = pyramid(levels, channels, device)
    replay = capture(lambda: gradients(pairs))
    with torch.no_grad():
        for x, y in pairs:
            x.copy_(x.flip(1) * 2), y.copy_(y.roll(1, dims=2))
    assert all(a.equal(b) for a, b in zip(gradients(pairs), replay()))


def capture(step: Step) -> Step:
    """The step as a CUDA graph, which uses the same tensors each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> Tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def measure(steps: Dict[str, Step], rounds: int) -> Dict[str, float]:
    """Median milliseconds of each step. The steps take turns."""
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _, (name, step) in itertools.product(range(rounds), steps.items()):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def time_all(rounds: int) -> Dict[str, Dict[str, float]]:
    """Times and memory of the backends, with min-max normalisation and without."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        pairs = pyramid(LEVELS, 256, "cuda", dtype)
        steps: Dict[str, Step] = {
            f"{backend}, {normalize}": partial(gradients, pairs, backend, normalize=normalize)
            for backend in ("definition", "analytic", "triton")
            for normalize in ("minmax", "none")
        }
        bytes_of_maps = sum(x.numel() * x.element_size() for x, _ in pairs)
        memory = {
            name: (peak_of(step, "cuda") or 0) / bytes_of_maps for name, step in steps.items()
        }
        for name in ("triton, minmax", "triton, none"):
            steps[f"{name}, CUDA graph"] = capture(steps[name])
        found[str(dtype)] = measure(steps, rounds)
        found[f"{dtype}, peak extra memory in map sets"] = memory
    return found


# --- parts ---


def kernels(args: argparse.Namespace) -> Dict[str, Any]:
    """The checks of the Triton kernels, and times of all backends."""
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return {"left out": "no GPU, and TRITON_INTERPRET=1 is not set"}
    with ExitStack() as stack:
        # the checks replace the trial that is made at the first use
        stack.enter_context(patch.object(gpu, "passes_self_test", return_value=True))
        if args.device == "cpu":
            stack.enter_context(patch.object(gpu, "covers", return_value=True))
        return check_kernels(args)


def check_kernels(args: argparse.Namespace) -> Dict[str, Any]:
    """Runs the checks of the kernels, and times all backends unless --small is given."""
    found: Dict[str, Any] = {}
    scale = (SMALL, 1, args.device) if args.small else (LEVELS, 64, args.device)
    checks = [check_accuracy, check_types, check_padding, check_nan, check_determinism]
    checks.append(check_extremes)
    for check in checks + [check_capture] * (args.device == "cuda"):
        begin = time.perf_counter()
        found[check.__name__] = check(*scale) or "passed"
        seconds = time.perf_counter() - begin
        print(f"{check.__name__}: passed in {seconds:.1f} s", flush=True)
    if not args.small:
        found["milliseconds"] = time_all(args.rounds)
    return found


def losses(args: argparse.Namespace) -> Dict[str, Any]:
    """Checks that a step with each loss has finite gradients, and that SSIM waits for nothing.

    A loss of dense heads takes a RetinaNet, whose detectors are larger.
    """
    found: Dict[str, Any] = {}
    for name in args.losses or sorted(name for name, _ in KD_LOSS_REGISTRY):
        compares = KD_LOSS_REGISTRY.get(name)().compares
        config = RETINANET if set(compares) <= {"dense", "cross"} else SHAPES
        bench = Bench(config, (128, 160), 2, [name], args.device)
        bench.step(name)
        wrong = [n for n, p in bench.model.named_parameters() if not finite(p.grad)]
        assert not wrong, f"{name}: the gradient of {wrong[0]} is not finite"
        found[name] = "passed"
        if "maps" in compares:
            student, teacher = bench.pair(name)
            with no_waits(args.device, name == "ssim"):
                bench.compare(name, student, teacher)
            assert all(m.grad is not None and finite(m.grad) for m in student.values()), name
        print(f"{name}: passed", flush=True)
    return found


def finite(gradient: Optional[Tensor]) -> bool:
    """Whether a gradient is finite; there may be none."""
    return gradient is None or bool(gradient.isfinite().all())


@contextmanager
def no_waits(device: str, forbidden: bool) -> Iterator[None]:
    """In this block an operator that waits for the GPU is an error."""
    if device == "cpu" or not forbidden:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(args: argparse.Namespace) -> Dict[str, Any]:
    """Seconds and peak memory of a step, and of the teacher with torch.compile."""
    config, size = (SHAPES, (64, 96)) if args.small else (R50, (800, 1333))
    bench = Bench(config, size, 2, ["ssim"], args.device)
    precisions = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if args.device == "cuda":
        precisions["float16"] = torch.float16

    def call(loss: str, dtype: torch.dtype) -> None:
        with torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
            bench.step(loss)

    steps = {
        f"{name}, {precision}": partial(call, loss, dtype)
        for precision, dtype in precisions.items()
        for name, loss in (("student alone", ""), ("distilled, ssim", "ssim"))
    }
    for one in steps.values():
        one()
    peaks = {name: peak_of(one, args.device) for name, one in steps.items()}
    seconds = interleave(steps, 2 if args.small else 10, clock_of(args.device))
    found: Dict[str, Any] = {
        name: {"seconds": seconds[name], "peak_bytes": peaks[name]} for name in steps
    }
    if not args.small:
        found["teacher"] = compiled_teacher(bench)
    return found


@torch.no_grad()
def compiled_teacher(bench: Bench) -> Dict[str, Any]:
    """Seconds of the teacher's backbone, and the largest difference that torch.compile makes."""
    teacher = bench.distillers["ssim"].teacher
    assert teacher is not None
    images = bench.model.preprocess_image(bench.batch).tensor
    networks = {
        name: TeacherNetwork(teacher.model.backbone, "float32", name == "compiled")
        for name in ("eager", "compiled")
    }
    maps = {name: network(images) for name, network in networks.items()}
    for level, exact in maps["eager"].items():
        assert (maps["compiled"][level] - exact).abs().max() <= 1e-2 * exact.abs().max(), level
    calls = {name: partial(network, images) for name, network in networks.items()}
    return interleave(calls, 10, clock_of(images.device))


PARTS = {"kernels": kernels, "losses": losses, "step": step}


def main(argv: Optional[List[str]] = None) -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("output/gpu_check"), help="files to write, without suffix")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run (all)")
    add("--losses", nargs="+", help="losses of the part losses (all)")
    add("--rounds", type=int, default=50, help="rounds of the kernels' times (50)")
    add("--small", action="store_true", help="small maps and detectors; no times of kernels")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.small:
        sys.exit("error: there is no GPU; --small checks without one, and TRITON_INTERPRET=1")
    found: Dict[str, Any] = {"torch": torch.__version__, "device": args.device, "commit": commit()}
    if args.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    failed = []
    for part in args.parts:
        begin = time.perf_counter()
        try:
            found[part] = PARTS[part](args)
        except Exception as error:
            traceback.print_exc()
            found[part] = {"failed": one_line(error)}
            failed.append(part)
        found[part]["seconds of this part"] = round(time.perf_counter() - begin, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    text = report(found)
    args.out.with_suffix(".md").write_text(text)
    print(f"\n{text}\n{args.out}.json, .md")
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


def report(found: Dict[str, Any]) -> str:
    """The figures in Markdown, a table for each part."""
    lines = [f"{found['device']}, torch {found['torch']}"]
    for part in (part for part in PARTS if part in found):
        rows = [[name, text_of(value)] for name, value in found[part].items()]
        lines.append(markdown([part, ""], rows))
    return "\n\n".join(lines) + "\n"


def text_of(value: Any) -> str:
    """A value of the JSON file in a cell of a table."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {text_of(one)}" for key, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
