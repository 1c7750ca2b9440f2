"""Batches of maps, predictions of heads, and losses for them, shared by these tests."""

import math
from dataclasses import fields, is_dataclass, replace

import numpy as np
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from ssimkd.losses import KD_LOSS_REGISTRY, Context
from ssimkd.losses.predictions import AnchorPredictions, ProposalPredictions

STRIDES = {"p3": 8, "p5": 32}
SIZES = [(64, 96), (40, 80), (64, 96), (33, 17)]  # pixels; padded to 64 x 96
COUNTS = [2, 1, 0, 3]  # instances of each image
CHANNELS, CLASSES = 16, 5


def targets(sizes, counts, seed=5, classes=CLASSES):
    """Ground truth: so many random boxes in each image."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for count, size in zip(counts, sizes):
        instances = Instances(size)
        ends = torch.rand(count, 2, 2, generator=generator).sort(1).values  # low, high
        boxes = ends * torch.tensor([size[1], size[0]])
        instances.gt_boxes = Boxes(boxes.flatten(1))
        instances.gt_classes = torch.randint(classes, (count,), generator=generator)
        result.append(instances)
    return result


def boxes_as_targets(sizes, boxes):
    """Ground truth with a given list of boxes, in pixels, for each image."""
    result = []
    for size, image in zip(sizes, boxes):
        result.append(Instances(size))
        result[-1].gt_boxes = Boxes(torch.tensor(image, dtype=torch.float32).reshape(-1, 4))
    return result


def random_maps(seed, sizes=SIZES, strides=STRIDES, channels=CHANNELS):
    """Level -> (N, C, H, W) in double precision; every image has another scale."""
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1.0, len(sizes) + 1).view(-1, 1, 1, 1)
    maps = {}
    for level, s in strides.items():
        shape = (len(sizes), channels, math.ceil(height / s), math.ceil(width / s))
        maps[level] = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return maps


def batch(sizes=SIZES, counts=COUNTS, strides=STRIDES, channels=CHANNELS):
    """Student's maps, with gradient, teacher's maps and context of images in one batch."""
    student, teacher = (random_maps(seed, sizes, strides, channels) for seed in (0, 1))
    student = {level: x.requires_grad_() for level, x in student.items()}
    context = Context(list(sizes), strides, targets(sizes, counts), iteration=10**6)
    return student, teacher, context


def random_boxes(generator, *shape):
    """(..., 4) boxes within 64 pixels, at least 4 pixels wide and high."""
    low, size = (60 * torch.rand(*shape, 2, generator=generator).double() for _ in range(2))
    return torch.cat([low, low + 4 + size], dim=-1)


def random_predictions(seed, sizes=SIZES, proposals=(4, 3, 0, 5), anchors=2, classes=CLASSES):
    """What heads of every kind predict, in double precision; so many proposals of each image."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def dense(stride):
        cells = sum(math.ceil(h / stride) * math.ceil(w / stride) for h, w in sizes)
        shape = (cells, anchors)
        boxes, centerness = random_boxes(generator, *shape), normal(*shape)
        return AnchorPredictions(normal(*shape, classes), None, boxes, centerness, positives=3.0)

    def rpn(stride):
        predictions = dense(stride)
        return AnchorPredictions(
            predictions.logits[..., :1].clone(), normal(*predictions.boxes.shape)
        )

    same = torch.Generator().manual_seed(11)  # student and teacher see the same proposals
    boxes = [Boxes(random_boxes(same, n).float()) for n in proposals[: len(sizes)]]
    count = sum(map(len, boxes))
    matcher = Matcher([0.2], [0, 1])
    return {
        "rpn": {level: rpn(s) for level, s in STRIDES.items()},
        "dense": {level: dense(s) for level, s in STRIDES.items()},
        "cross": {level: dense(s) for level, s in STRIDES.items()},
        "roi": [
            ProposalPredictions(
                normal(count, classes + 1), normal(count, classes, 4), boxes, matcher
            )
        ],
    }


def changed(side, function):
    """One side of a comparison, maps or predictions, with a function applied to each tensor."""
    if isinstance(side, torch.Tensor):
        return function(side)
    if isinstance(side, dict):
        return {key: changed(value, function) for key, value in side.items()}
    if isinstance(side, list):
        return [changed(value, function) for value in side]
    if is_dataclass(side):
        values = {
            field.name: changed(getattr(side, field.name), function) for field in fields(side)
        }
        return replace(side, **values)
    return side


def tensors_of(side):
    """The tensors of one side of a comparison."""
    found = []
    changed(side, found.append)
    return found


def batch_for(name, sizes=SIZES, counts=COUNTS, proposals=(4, 3, 0, 5), anchors=2, classes=CLASSES):
    """What a loss is called with: as :func:`batch`, or the predictions that it compares."""
    student, teacher, context = batch(sizes, counts)
    context.targets = targets(sizes, counts, classes=classes)
    kinds = KD_LOSS_REGISTRY.get(name)().compares
    if "maps" in kinds:
        return student, teacher, context
    student, teacher = (
        random_predictions(seed, sizes, proposals, anchors, classes) for seed in (0, 1)
    )
    student, teacher = ({k: x for k, x in s.items() if k in kinds} for s in (student, teacher))
    return changed(student, lambda x: x.requires_grad_()), teacher, context


def alone(student, teacher, context, image):
    """One image of a batch, cut out."""
    cut = []
    for maps in (student, teacher):
        cut.append({})
        for level, x in maps.items():
            h, w = context.cells(level, x)[image]
            cut[-1][level] = x[image : image + 1, :, :h, :w]
    objects = context.targets and [context.targets[image]]
    sizes = [context.image_sizes[image]]
    return *cut, Context(sizes, context.strides, objects, iteration=context.iteration)


def make_loss(
    name, channels=CHANNELS, levels=STRIDES, trained=True, num_classes=CLASSES, **options
):
    """A loss in double precision; `trained` moves its parameters away from where they start."""
    loss = KD_LOSS_REGISTRY.get(name)(**options)
    torch.manual_seed(0)
    loss.attach(dict.fromkeys(levels, channels), num_classes)
    with torch.no_grad():
        for parameter in loss.parameters():
            if trained:
                parameter += 0.2 * torch.randn_like(parameter)
    return loss.double()


def run(loss, student, teacher, context, seed=7):
    """The parts of a loss; what it draws at random depends on the seed alone."""
    torch.manual_seed(seed)
    return loss(student, teacher, context)


def mean_over_images(loss, student, teacher, context):
    """Each part of the loss, averaged over the images of a batch on their own."""
    parts = []
    torch.manual_seed(7)  # the images draw one after another
    for image in range(len(context.image_sizes)):
        parts.append(loss(*alone(student, teacher, context, image)))
    return {name: torch.stack([x[name] for x in parts]).mean() for name in parts[0]}


def assert_every_parameter_learns(loss, maps):
    """The second step reaches every parameter; in the first, layers of zeros stop the gradient."""
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        run(loss, *maps)["p3"].backward()
        optimizer.step()
    for name, parameter in loss.named_parameters():
        assert parameter.grad.abs().max() > 1e-8, name


def softmax(x):
    """In NumPy, over all of x."""
    powers = np.exp(x - x.max())
    return powers / powers.sum()
