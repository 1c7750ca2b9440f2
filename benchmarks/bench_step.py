"""Part 2 of bench.py: a training step of a student with each loss and without distillation."""

import argparse
import os
import tempfile
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from memory import peak_of
from ssimkd.data.datasets import classes_in
from ssimkd.engine.arguments import load_config
from ssimkd.errors import ConfigError
from ssimkd.losses import KD_LOSS_REGISTRY
from ssimkd.modeling.distiller import Captured, Distiller
from ssimkd.utils.config_keys import without_pretraining
from ssimkd.utils.measure import Call, clock_of, interleave, markdown
from torch import Tensor, nn

OF_MAPS = sorted(name for name, loss in KD_LOSS_REGISTRY if "maps" in loss().compares)
STUDENT, TEACHER = "student alone", "teacher backbone, float32"


def make_batch(size: Sequence[int], images: int, classes: int) -> List[Dict[str, Any]]:
    """Random images of `size` (height, width) with eight objects each."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    batch = []
    for _ in range(images):
        corners = torch.rand(8, 2, generator=generator) * torch.tensor([width, height]) / 2
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corners, corners * 2], dim=1))
        instances.gt_classes = torch.randint(classes, (8,), generator=generator)
        pixels = (3, height, width)
        image = torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def damp(model: nn.Module) -> None:
    """Lets each residual block add little.

    Without this the maps of a network with random weights are too large for float16.
    """
    for block in model.modules():
        if isinstance(block, BottleneckBlock) and block.conv3.norm is not None:
            block.conv3.norm.weight.data.fill_(0.1)


class Bench:
    """A student, its teacher and a Distiller for each loss, all with random weights.

    Args:
        config (str): the student's .yaml config, which names the teacher.
        size, images: see :func:`make_batch`.
        losses (sequence[str]): names in the registry.
        device (str): where to run.
        opts (sequence): overrides of the config.
    """

    def __init__(
        self,
        config: str,
        size: Sequence[int],
        images: int,
        losses: Sequence[str],
        device: str,
        opts: Sequence = (),
    ) -> None:
        overrides = ["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", *opts]
        self.cfg = without_pretraining(load_config(config, overrides, splits=()))
        architecture = self.cfg.MODEL.META_ARCHITECTURE
        torch.manual_seed(0)
        self.device = torch.device(device)
        if self.cfg.MODEL.MASK_ON or self.cfg.MODEL.KEYPOINT_ON or "Panoptic" in architecture:
            raise ConfigError(f"--config: {config}: the images of this benchmark have boxes alone")
        self.model = build_model(self.cfg).train()
        damp(self.model)
        self.run = self.model  # bench_growth.py wraps it for several processes
        self.classes = classes_in(getattr(self.model, "roi_heads", self.model))
        self.batch = make_batch(size, images, self.classes)
        self.distillers = self._distillers(losses)
        own = [p for n, p in self.model.named_parameters() if not n.startswith("distiller.")]
        # With a learning rate of 0 every repeat starts from the same weights.
        self.optimizer = torch.optim.SGD([p for p in own if p.requires_grad], 0.0, momentum=0.9)

    def _distillers(self, losses: Sequence[str]) -> Dict[str, Distiller]:
        node = self.cfg.MODEL.DISTILL
        spec = Distiller(self.cfg).spec
        teacher = spec.build(spec.load_config(), self.device)
        damp(teacher)
        found: Dict[str, Distiller] = {}
        with tempfile.TemporaryDirectory() as folder:
            node.TEACHER.WEIGHTS = os.path.join(folder, "teacher.pth")
            torch.save({"model": teacher.state_dict()}, node.TEACHER.WEIGHTS)
            for name in losses:
                node.LOSSES = (name,)
                distiller = Distiller(self.cfg).to(self.device)
                distiller.attach(self.model.backbone.output_shape(), self.classes, self.model)
                if found:  # all losses share one teacher
                    first = next(iter(found.values()))
                    distiller.teacher = first.teacher
                    distiller.teacher_levels = first.teacher_levels
                else:
                    distiller.build_teacher(self.device)
                found[name] = distiller.to(self.device)
        self.teacher = teacher.eval()
        return found

    def step(self, loss: str = "") -> None:
        """A training step, with distillation by a loss or without."""
        self.model.distiller = self.distillers[loss] if loss else None
        self.optimizer.zero_grad()
        with EventStorage(0):
            sum(self.run(self.batch).values()).backward()
        self.optimizer.step()

    @torch.no_grad()
    def teach(self) -> Dict[str, Tensor]:
        """The teacher's maps as the plain detector computes them in float32."""
        return self.teacher.backbone(self.teacher.preprocess_image(self.batch).tensor)

    @torch.no_grad()
    def pair(self, loss: str) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
        """Maps of student and teacher as a loss gets them. The student's require gradient."""
        images = self.model.preprocess_image(self.batch).tensor
        maps = self.model.backbone(images)
        batch = Captured(self.batch, maps, images, self.model.preprocessing)
        student, teacher, *_ = self.distillers[loss].match(batch)
        return {level: m.requires_grad_() for level, m in student.items()}, teacher

    def compare(self, loss: str, student: Dict[str, Tensor], teacher: Dict[str, Tensor]) -> None:
        """Forward and backward of a loss alone."""
        for m in student.values():
            m.grad = None
        with EventStorage(0):
            terms = self.distillers[loss].compare(student, teacher, self.batch)[loss]
            torch.stack(list(terms.values())).sum().backward()


def bench_step(args: argparse.Namespace) -> Dict:
    """Measures the student's step, the teacher's backbone, and the step with each loss."""
    losses = args.losses or OF_MAPS
    bench = Bench(args.config, args.size, args.step_images, losses, args.device, args.opts)
    bench.step()  # the first step makes the state of the optimizer
    calls: Dict[str, Call] = {STUDENT: bench.step, TEACHER: bench.teach}
    for loss in losses:
        calls[f"distilled, {loss}"] = partial(bench.step, loss)
    peaks: Dict[str, Optional[int]] = {}
    for name, call in calls.items():
        peak = peak_of(call, args.device)
        # on a CPU it depends on what earlier calls have left
        peaks[name] = peak if args.device == "cuda" else None
        print(f"{name}: done once", flush=True)
    maps = bench.pair(losses[0])
    for loss in losses:
        calls[loss] = partial(bench.compare, loss, *maps)
    clock = clock_of(args.device, args.cpu_time)
    seconds = interleave(calls, args.step_repeats, clock)
    whole = seconds[STUDENT] + seconds[TEACHER]
    results: Dict[str, Dict] = {}
    for name, peak in peaks.items():
        results[name] = {"seconds": seconds[name], "peak_bytes": peak}
        if name.startswith("distilled, "):
            share = seconds[name.partition(", ")[2]] / seconds[name]
            results[name].update(share_of_loss=share, ratio=seconds[name] / whole)
    return results


def step_table(results: Dict) -> str:
    """The table in Markdown, with a row for each step."""
    head = ["", "s", "loss's share, %", "ratio to student + teacher", "peak extra memory, GB"]
    rows = []
    for name, result in results.items():
        share = f"{100 * result['share_of_loss']:.1f}" if "ratio" in result else "-"
        ratio = f"{result['ratio']:.3f}" if "ratio" in result else "-"
        peak = "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 1e9:.2f}"
        rows.append([name, f"{result['seconds']:.3g}", share, ratio, peak])
    return markdown(head, rows)
