"""What a distilled step sends between GPUs, and what that costs: the numbers of docs/performance.md.

    python benchmarks/scaling.py

Bytes and operations are counted on the real models, on torch's "meta" device, which computes
nothing. Times are calculated, not measured: from the seconds per iteration that Detectron2's zoo
publishes, a ring all-reduce, and the bandwidth and latency that are given.
"""

import argparse
import math
import sys
from typing import Dict, List, NamedTuple, Sequence

import torch
from detectron2.modeling import build_model
from ssimkd.engine.arguments import load_config
from ssimkd.modeling.distiller import Distiller
from ssimkd.utils.measure import markdown
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

IMAGES = 2  # on each GPU, as the zoo's 16 on 8
SIZE = (800, 1344)  # pixels, padded to the strides
PROPOSALS = 512  # of an image that the box head sees in training
BUCKET = 25e6  # bytes that DistributedDataParallel sends at once
SHORT_SIDES = (640, 672, 704, 736, 768, 800)  # pixels, INPUT.MIN_SIZE_TRAIN
# config -> seconds per iteration of training student and teacher on 8 V100, 16 images: MODEL_ZOO.md
PUBLISHED = {
    "configs/ssimkd_R50.yaml": (0.210, 0.286),
    "configs/ssimkd_retinanet_R50.yaml": (0.205, 0.291),
}


class Work(NamedTuple):
    """One GPU's part of a step.

    Attributes:
        gradients (float): bytes, float32.
        checkpoint (float): bytes of weights and momentum.
        teacher (float): bytes of its weights on each GPU; they are never sent.
        forward, backward, teacher_forward (float): operations, a multiplication and an addition
            being two.
    """

    gradients: float
    checkpoint: float
    teacher: float
    forward: float
    backward: float
    teacher_forward: float


def count(config: str) -> Work:
    """Counts a distilled step of a YAML config of Faster R-CNN or RetinaNet."""
    cfg = load_config(config, ["MODEL.DEVICE", "meta"], ())
    model = build_model(cfg)
    distiller: Distiller = model.distiller
    teacher = distiller.spec.build(distiller.spec.load_config(), torch.device("meta")).eval()
    images = torch.empty(IMAGES, 3, *SIZE, device="meta")
    with FlopCounterMode(display=False) as forward:
        outputs = heads(model, model.backbone(images))
    with FlopCounterMode(display=False) as backward:
        torch.stack([x.sum() for x in outputs]).sum().backward()
    with FlopCounterMode(display=False) as taught, torch.no_grad():
        teacher.backbone(images)
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    values = sum(x.numel() for x in model.state_dict().values())
    return Work(
        4 * trained,
        4 * (values + trained),
        4 * sum(x.numel() for x in teacher.backbone.state_dict().values()),
        forward.get_total_flops(),
        backward.get_total_flops(),
        taught.get_total_flops(),
    )


def heads(model, maps: Dict[str, Tensor]) -> List[Tensor]:
    """What a detector's heads make of the maps, as far as it is worth counting."""
    if hasattr(model, "head"):  # RetinaNet
        scores, boxes = model.head([maps[level] for level in model.head_in_features])
        return [*scores, *boxes]
    rpn, roi_heads = model.proposal_generator, model.roi_heads
    scores, boxes = rpn.rpn_head([maps[level] for level in rpn.in_features])
    side = roi_heads.box_pooler.output_size
    channels = next(iter(maps.values())).shape[1]
    pooled = torch.empty(IMAGES * PROPOSALS, channels, *side, device="meta")
    return [*scores, *boxes, *roi_heads.box_predictor(roi_heads.box_head(pooled))]


def all_reduce(size: float, gpus: int, bandwidth: float, latency: float) -> float:
    """Seconds of a ring all-reduce.

    Each GPU sends 2 (n - 1) pieces of size / n bytes, one after the other.

    Args:
        size (float): bytes.
        gpus (int): n.
        bandwidth (float): bytes per second through the slowest link of the ring.
        latency (float): seconds of one hop.
    """
    return 2 * (gpus - 1) * (size / gpus / bandwidth + latency)


def exposed(work: Work, gpus: int, bandwidth: float, latency: float, backward: float) -> float:
    """Seconds of a step in which the GPUs only wait for the all-reduce.

    Buckets are sent while the backward pass goes on; the last one is complete when it ends.
    """
    buckets = math.ceil(work.gradients / BUCKET)
    one = all_reduce(work.gradients / buckets, gpus, bandwidth, latency)
    return max(buckets * one - backward, one)


def slowest(gpus: int) -> float:
    """Pixels of the slowest GPU's images, relative to the mean GPU's, of SHORT_SIDES at random.

    Its images are padded to the largest: P(short side of all <= the k-th of K) = (k / K)^images.
    """

    def mean_of_largest(images: int) -> float:
        total, below = 0.0, 0.0
        for k, side in enumerate(SHORT_SIDES, start=1):
            up_to = (k / len(SHORT_SIDES)) ** images
            total, below = total + side**2 * (up_to - below), up_to
        return total

    return mean_of_largest(IMAGES * gpus) / mean_of_largest(IMAGES)


def report(config: str, gpus: Sequence[int], bandwidths: Sequence[float], latency: float) -> None:
    """Prints one config's numbers as Markdown."""
    work, (student, teacher) = count(config), PUBLISHED[config]
    # as in configs/README.md: a third of the teacher's training step bounds its forward pass
    step, backward = student + teacher / 3, student * 2 / 3
    print(f"\n### {config}\n")
    for name, value in work._asdict().items():
        unit = "MB" if value < 1e11 else "GFLOP"
        print(f"- {name}: {value / (1e6 if unit == 'MB' else 1e9):.0f} {unit}")
    print(f"- step {1e3 * step:.0f} ms (of it backward {1e3 * backward:.0f} ms), at most\n")
    rows = []
    for n in gpus:
        cells = [f"{n}"]
        for b in bandwidths:
            waits = exposed(work, n, b * 1e9, latency, backward)
            whole = all_reduce(work.gradients, n, b * 1e9, latency)
            cells.append(f"{1e3 * whole:.0f}, waits {1e3 * waits:.0f}: {step / (step + waits):.0%}")
        rows.append([*cells, f"{slowest(n):.2f}"])
    columns = [f"{b:g} GB/s" for b in bandwidths]
    print(markdown(["GPUs", *columns, "slowest GPU's pixels"], rows))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64, 256])
    parser.add_argument(
        "--bandwidth", type=float, nargs="+", default=[1.25, 12.5, 50.0], help="GB/s"
    )
    parser.add_argument("--latency", type=float, default=10.0, help="microseconds per hop")
    args = parser.parse_args()
    print(f"`{' '.join(['python', *sys.argv])}`: milliseconds of an all-reduce, of which each step")
    print("waits so many, and the step's share that is left for work.")
    for config in PUBLISHED:
        report(config, args.gpus, args.bandwidth, args.latency * 1e-6)


if __name__ == "__main__":
    main()
