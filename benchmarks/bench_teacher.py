#!/usr/bin/env python
r"""Measures how a teacher's PRECISION and COMPILE change its time and its maps.

    python benchmarks/bench_teacher.py                # the teacher of the Shapes data
    python benchmarks/bench_teacher.py --compile      # with torch.compile; takes minutes on a CPU
    python benchmarks/bench_teacher.py --config COCO-Detection/faster_rcnn_R_101_FPN_3x \
        --images 1 --size 320 512                     # another teacher, with random weights

Times are medians relative to the detector's own backbone under torch.no_grad(). On a CPU they are
CPU time. The images are resized images of the Shapes data.
"""

import argparse
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from ssimkd.errors import exit_in_one_line
from ssimkd.ssim.definition import ssim_map
from ssimkd.ssim.normalize import normalize_maps
from ssimkd.teacher.frozen import Teacher
from ssimkd.teacher.spec import TeacherSpec
from ssimkd.utils.measure import clock_of, interleave, markdown
from ssimkd_cli import at_least
from torch import Tensor
from torch.nn.functional import interpolate

PLAIN = "the detector's own backbone"
LEAST_CELLS = 4  # sides of a map; smaller ones have no structure to compare

Maps = Dict[str, Tensor]


def make_batch(count: int, size: List[int]) -> List[Dict[str, Tensor]]:
    """Images of the Shapes data in BGR."""
    batch = []
    for record in DatasetCatalog.get("ssimkd_shapes_val")[:count]:
        image = torch.as_tensor(read_image(record["file_name"], "BGR").copy()).permute(2, 0, 1)
        batch.append({"image": interpolate(image[None].float(), size, mode="bilinear")[0].byte()})
    return batch


def with_random_weights(spec: TeacherSpec, folder: str) -> TeacherSpec:
    """The same teacher with random weights, which are written to a file in `folder`."""
    model = spec.build(spec.load_config(), torch.device("cpu"))
    path = str(Path(folder) / "random.pth")
    torch.save({"model": model.state_dict()}, path)
    return TeacherSpec(spec.config, path, spec.opts)


def runs_of(
    spec: TeacherSpec, batch: List[Dict], compiled: bool, device: torch.device
) -> Dict[str, Callable[[], Maps]]:
    """Name of a setting -> a run of the backbone on the same images."""
    detector: Any = spec.load(device)[0]
    images = detector.preprocess_image(batch).tensor

    @torch.no_grad()
    def plain() -> Maps:
        return detector.backbone(images)

    runs: Dict[str, Callable[[], Maps]] = {PLAIN: plain}
    for compile_it, precision in product(
        [False, True][: 1 + compiled], ["float32", "bfloat16", "float16"]
    ):
        teacher = Teacher(TeacherSpec(spec.config, spec.weights, (), precision, compile_it), device)
        name = f"{precision}, compiled" if compile_it else precision
        runs[name] = lambda t=teacher: t(batch, images, t.preprocessing)[0]  # type: ignore[misc]
    return runs


def difference(maps: Maps, exact: Maps) -> Dict[str, float]:
    """Level -> 1 - SSIM of maps that are normalised like those of the SSIM loss by default."""
    return {
        level: 1
        - float(ssim_map(*normalize_maps(maps[level], x, "minmax", "channel", None)).mean())
        for level, x in exact.items()
        if min(x.shape[-2:]) >= LEAST_CELLS
    }


def bench_teacher(args: argparse.Namespace) -> str:
    """A table in Markdown: for each setting its time relative to PLAIN, and 1 - SSIM by level."""
    device = torch.device(args.device)
    batch = make_batch(args.images, args.size)
    with tempfile.TemporaryDirectory() as folder:
        spec = TeacherSpec(args.config, args.weights)
        spec = spec if args.weights else with_random_weights(spec, folder)
        runs = runs_of(spec, batch, args.compile, device)
    seconds = interleave(runs, args.repeats, clock_of(device, cpu_time=True))
    exact = runs[PLAIN]()
    levels = list(difference(exact, exact))
    rows = []
    for name, run in runs.items():
        cells = [f"{value:.1e}" for value in difference(run(), exact).values()]
        rows.append([name, f"{seconds[name] / seconds[PLAIN]:.2f}", *cells])
    table = markdown(["", "time", *(f"1 - SSIM, {level}" for level in levels)], rows)
    threads = torch.get_num_threads()
    return f"{table}\n\n{PLAIN}: {1000 * seconds[PLAIN]:.1f} ms, {threads} threads, {device}"


def main(words=None) -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", help="config of a teacher, like MODEL.DISTILL.TEACHER.CONFIG")
    add("--weights", default="", help="weights for --config (random)")
    add("--size", type=at_least(1), nargs=2, default=(96, 96), help="height and width in pixels")
    add("--images", type=at_least(1), default=8, help="images of a batch")
    add("--repeats", type=at_least(1), default=15)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=at_least(1), default=1, help="CPU threads of torch")
    add("--compile", action="store_true", help="also measure torch.compile")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    if not args.config:
        args.config, args.weights = "configs/shapes/teacher.yaml", "configs/shapes/teacher.pth"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    with exit_in_one_line():
        print(bench_teacher(args))


if __name__ == "__main__":
    main()
