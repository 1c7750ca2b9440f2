#!/usr/bin/env python
r"""Times the teacher's settings, and says how far each of them changes its maps.

    python benchmarks/bench_teacher.py                # the teacher of the Shapes data
    python benchmarks/bench_teacher.py --compile      # torch.compile, too: minutes on a CPU
    python benchmarks/bench_teacher.py --config COCO-Detection/faster_rcnn_R_101_FPN_3x \
        --images 1 --size 320 512                    # times of another one: random weights
    python benchmarks/bench_teacher.py --step         # training steps

Times are medians over repeats that take the settings in turn; CPU time, where a CPU runs them.
Ratios are to the detector's own backbone under torch.no_grad(). Images are those of the embedded
data, scaled.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple, cast

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from ssimkd.engine.arguments import load_config
from ssimkd.engine.yaml_driver import DistillTrainer
from ssimkd.errors import exit_in_one_line
from ssimkd.ssim.definition import ssim_map
from ssimkd.ssim.normalize import normalize_maps
from ssimkd.teacher.frozen import Teacher
from ssimkd.teacher.spec import TeacherSpec
from ssimkd.utils.measure import clock_of, interleave, markdown, positive
from torch import Tensor
from torch.nn.functional import interpolate

STUDENT = "configs/shapes/ssimkd.yaml"
KEY = "MODEL.DISTILL.TEACHER"
# Overrides for the fastest teacher; they cost less than a thousandth of SSIM
FAST_TEACHER = (f"{KEY}.PRECISION", "bfloat16", f"{KEY}.COMPILE", True)
# Fewer cells say nothing about structure
LEAST_CELLS = 4

Maps = Dict[str, Tensor]


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def batches(count: int, images: int) -> Tuple[CfgNode, List[List[Dict]]]:
    """A student's config, and batches as it trains on them."""
    cfg = cast(CfgNode, load_config(STUDENT, ["SOLVER.IMS_PER_BATCH", str(images)]))
    return cfg, list(islice(iter(DistillTrainer.build_train_loader(cfg)), count))


def weights_of(spec: TeacherSpec, folder: str) -> TeacherSpec:
    """The same teacher with random weights in a file."""
    model = spec.build(spec.load_config(), torch.device("cpu"))
    path = str(Path(folder) / "random.pth")
    torch.save({"model": model.state_dict()}, path)
    return TeacherSpec(spec.config, path, spec.opts)


def structure(found: Maps, exact: Maps) -> Dict[str, float]:
    """1 - SSIM by level, of maps normalised as the loss does by default."""
    return {
        level: 1
        - float(ssim_map(*normalize_maps(found[level], x, "minmax", "channel", None)).mean())
        for level, x in exact.items()
        if min(x.shape[-2:]) >= LEAST_CELLS
    }


# --- the teacher alone ---


def bench_forward(args: argparse.Namespace, device: torch.device) -> None:
    """Prints a row per setting: time as a share of the plain backbone's, 1 - SSIM by level."""
    _, (batch,) = batches(1, args.images)
    shown = [
        {"image": interpolate(x["image"][None].float(), args.size, mode="bilinear")[0].byte()}
        for x in batch
    ]
    with tempfile.TemporaryDirectory() as folder:
        spec = TeacherSpec(args.config, args.weights)
        spec = spec if args.weights else weights_of(spec, folder)
        runs = settings(spec, shown, args.compile, device)
    seconds = interleave(runs, args.repeats, clock_of(device, cpu_time=True))
    exact = runs["plain"]()
    levels = list(structure(exact, exact))
    rows = []
    for name, run in runs.items():
        cells = [f"{value:.1e}" for value in structure(run(), exact).values()]
        rows.append([name, f"{seconds[name] / seconds['plain']:.2f}", *cells])
    print(markdown(["", "time", *(f"1 - SSIM, {level}" for level in levels)], rows))
    print(f"\nplain: {1000 * seconds['plain']:.1f} ms, {torch.get_num_threads()} threads, {device}")


def settings(
    spec: TeacherSpec, shown: List[Dict], compiled: bool, device: torch.device
) -> Dict[str, Callable[[], Maps]]:
    """Name -> a run of the backbone from the same normalised batch."""
    detector: Any = spec.load(device)[0]
    images = detector.preprocess_image(shown).tensor

    def plain(mode: Callable) -> Maps:
        with mode():
            maps = detector.backbone(images)
        wait(device)
        return maps

    def ours(precision: str, compiled: bool) -> Callable[[], Maps]:
        chosen = TeacherSpec(spec.config, spec.weights, spec.opts, precision, compiled)
        teacher = Teacher(chosen, device)

        def run() -> Maps:
            maps, _ = teacher(shown, images, teacher.preprocessing)
            wait(device)
            return maps

        return run

    runs = {
        "plain": lambda: plain(torch.no_grad),
        "plain, inference_mode": lambda: plain(torch.inference_mode),
    }
    for precision in ("float32", "bfloat16", "float16"):
        runs[precision] = ours(precision, False)
    if compiled:
        runs["float32, compiled"] = ours("float32", True)
        runs["bfloat16, compiled"] = ours("bfloat16", True)
    return runs


# --- training steps ---


def bench_step(args: argparse.Namespace, device: torch.device) -> None:
    """Prints a row per setting: time of a step on the Shapes data, and the distillation loss."""
    _, shown = batches(4, 8)
    steps = {
        "no distillation": Step(device, shown, "MODEL.DISTILL.LOSSES", ()),
        "as it is": Step(device, shown),
    }
    if args.compile:
        steps["fast teacher"] = Step(device, shown, *FAST_TEACHER)
    seconds = interleave(steps, args.repeats, clock_of(device, cpu_time=True))
    base = seconds["as it is"]
    rows = [
        [name, f"{seconds[name] / base:.3f}", f"{step.losses[0]:.6f}"]
        for name, step in steps.items()
    ]
    print(markdown(["", "time of a step", "distillation loss of the first"], rows))
    print(f"\nas it is: {1000 * base:.0f} ms, {torch.get_num_threads()} threads, {device}")


class Step:
    """A student in training: a call is a step, on a few batches in turn.

    Attributes:
        losses (list[float]): the distillation loss of each step.
    """

    def __init__(self, device: torch.device, shown: List[List[Dict]], *opts: Any) -> None:
        cfg = load_config(STUDENT, ["MODEL.DEVICE", str(device), *opts])
        torch.manual_seed(0)
        self.model = build_model(cfg).train()
        self.model.distiller.build_teacher(device)
        self.optimizer = build_optimizer(cfg, self.model)
        self.shown = shown
        self.losses: List[float] = []

    def __call__(self) -> None:
        """Forward, backward, update."""
        torch.manual_seed(0)  # the same proposals in all
        with EventStorage(0):
            losses = self.model(self.shown[len(self.losses) % len(self.shown)])
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()
        self.losses.append(float(losses.get("ssim_kd_loss", torch.tensor(0.0)).detach()))


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="a teacher's, as MODEL.DISTILL.TEACHER.CONFIG")
    parser.add_argument("--weights", default="", help="of --config; else random: no SSIM to go by")
    parser.add_argument("--size", type=positive, nargs=2, default=(96, 96), help="image, in pixels")
    parser.add_argument("--images", type=positive, default=8, help="images of a batch")
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of torch")
    parser.add_argument("--compile", action="store_true", help="time torch.compile, too")
    parser.add_argument("--step", action="store_true", help="time training steps instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.config:
        args.config, args.weights = "configs/shapes/teacher.yaml", "configs/shapes/teacher.pth"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    with exit_in_one_line():
        (bench_step if args.step else bench_forward)(args, torch.device(args.device))


if __name__ == "__main__":
    main()
