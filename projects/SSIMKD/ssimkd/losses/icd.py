"""ICD: instance-conditional distillation (Kang et al., NeurIPS 2021).

For each instance of an image, an attention learns which cells of the teacher's maps describe it.

C   channels of the maps             L   cells of one image, of all levels together
M   heads of the attention           K   queries of one image: R real instances, then fake ones
d   channels of a head, C / M        E   length of a query's code
"""

import math
from dataclasses import dataclass
from typing import Dict, List, Tuple

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn

from ssimkd.errors import ConfigError
from ssimkd.registry import register_loss
from ssimkd.ssim.normalize import TINY
from ssimkd.utils.validate import check_coefficients, check_integers

from .base import KDLoss, Maps, in_float
from .context import Context

CENTER_FEATURES = 128  # sinusoids per coordinate of a centre
SCALES = 5  # classes of a box's side: below 64, 128, 256, 512 pixels, or longer
FAKE_SIDE = (0.2, 0.2, 0.002, 0.6)  # mean, deviation, least and most, as shares of the image
FAKE_CENTER = (0.03, 0.97)  # least and most, as shares of the image


@dataclass
class Queries:
    """Instances of one image, real ones first, then fake ones.

    Attributes:
        classes (Tensor): (K,), integers.
        boxes (Tensor): (K, 4), x0, y0, x1, y1 in pixels.
        centers (Tensor): (K, 2), x, y in pixels; the boxes' centres, moved at random.
        image (Tensor): (2,), width and height in pixels.
        real (int): R.
    """

    classes: Tensor
    boxes: Tensor
    centers: Tensor
    image: Tensor
    real: int

    @property
    def extents(self) -> Tensor:
        """(K, 2), width and height in pixels, at least 1: the box error divides by them."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]).clamp_min(1)

    def to(self, like: Tensor) -> "Queries":
        """These queries on the device of a tensor, with its type but for the classes."""
        boxes, centers, image = (
            x.to(like, non_blocking=True) for x in (self.boxes, self.centers, self.image)
        )
        classes = self.classes.to(like.device, non_blocking=True)
        return Queries(classes, boxes, centers, image, self.real)

    def code(self, num_classes: int) -> Tensor:
        """(K, E), the paper's E(y): class, moved centre, and floor(log2) of width and height.

        The exact box is left out: with it the decoder could predict without reading the maps.
        """
        scales = (self.extents.log2().floor() - 5).clamp(0, SCALES - 1).long()
        parts = [
            F.one_hot(self.classes, num_classes).to(self.boxes),  # (K, num_classes)
            sinusoids(self.centers / self.image, CENTER_FEATURES).flatten(1),  # (K, 256)
            F.one_hot(scales, SCALES).to(self.boxes).flatten(1),  # (K, 10)
        ]
        return torch.cat(parts, 1)

    def box_error(self, predicted: Tensor) -> Tensor:
        """Sum over the real boxes of the L1 error of their sides, as shares of the box.

        Args:
            predicted (Tensor): (K, 4) in [0, 1], distances from the moved centre to the left,
                upper, right and lower side, as shares of the image.
        """
        low, high = self.centers - self.boxes[:, :2], self.boxes[:, 2:] - self.centers
        error = (predicted * self.image.repeat(2) - torch.cat([low, high], 1)).abs()
        return (error / self.extents.repeat(1, 2))[: self.real].sum()


class Decoder(nn.Module):
    """A transformer decoder layer without self-attention, and the head of the auxiliary task."""

    def __init__(self, code_length: int, channels: int, heads: int) -> None:  # E, C, M
        super().__init__()
        self.heads = heads
        self.encoder = mlp(code_length, channels, channels)  # F_q
        self.position = nn.Linear(channels, channels)  # F_pe
        self.query, self.key, self.value = (projection(channels) for _ in range(3))  # F^q, F^k, F^v
        self.out = nn.Linear(channels, channels)
        self.attended = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, channels)
        )
        self.decoded = nn.LayerNorm(channels)
        self.predictor = mlp(channels, channels, 5)  # F_obj and F_reg

    def forward(
        self, code: Tensor, cells: Tensor, positions: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Decodes the queries of one image.

        Args:
            code (Tensor): (K, E), the queries.
            cells, positions (Tensor): (L, C), A and P.

        Returns:
            (Tensor, Tensor, Tensor): (K, 5), logits of "is real" and of the box's sides;
            (M, K, L), the attention m, whose sum over L is 1; (L, C), the values V.
        """
        query = self.encoder(code)
        values = self.value(cells)
        keys = split_heads(self.key(cells + self.position(positions)), self.heads)  # (L, M, d)
        asked = split_heads(self.query(query), self.heads) / math.sqrt(keys.shape[-1])  # (K, M, d)
        attention = (asked.transpose(0, 1) @ keys.permute(1, 2, 0)).softmax(-1)
        found = attention @ split_heads(values, self.heads).transpose(0, 1)  # (M, K, d)
        query = self.attended(query + self.out(found.transpose(0, 1).flatten(1)))
        query = self.decoded(query + self.feed_forward(query))
        return self.predictor(query), attention, values


@register_loss("icd")
class ICDLoss(KDLoss):
    """Instance-conditional distillation, in the paper's symbols.

        q_i = F_q(E(y_i))                          a query per instance y_i, real or fake
        K_j = F_j^k(A + F_pe(P)),  V_j = F_j^v(A)  keys and values of head j, A: teacher's cells
        m_ij = softmax(K_j F_j^q(q_i) / sqrt(d))   over the cells of all levels
        L_distill = 1/(M N_r) sum_j sum_(real i) <m_ij, MSE(LN(V_j^S), LN(V_j))>
        L_aux = BCE(is y_i real?) + L1(box of a real y_i), from the decoded queries
        L = L_aux + lambda L_distill

    Kang et al., "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS 2021.
    V_j^S comes from the student's cells by a projection of its own. LN normalises the d values of a
    cell and head to mean 0 and variance 1, so that L_distill lies in [0, 4]. Equal maps cost 0 once
    the two projections agree. L_distill trains the student and its projection, and treats m and V
    as constants. L_aux trains the decoder alone.

    Where the paper says nothing, the loss follows its authors' PyTorch code. A box's error is
    measured from the moved centre, in units of its width and height. N_r is the number of real
    instances of one image; an image without instances counts as 0 in the mean over images. The two
    terms of L_aux are means over the queries and over the real instances of the batch. Differences
    from that code:

    - For COCO it draws fake instances by statistics of each class. Here its rule for other data
      holds: all classes are equally likely, and sides are 0.2 +- 0.2 of the image's.
    - It trains the decoder and the student's projection by AdamW (rate 1e-4, cosine, gradient norm
      clipped to 0.01). Here the detector's optimizer trains them. At the learning rates of SGD,
      small boxes would saturate the box predictions for good; `aux_clip` prevents this.
    - It encodes a box's size in pixels of the batch's last image, and uses 1.44 ln for log2. Here
      the size is in pixels of the box's own image, and a side counts as at least one pixel.
    - Its strides are the padded image's size over the map's. Where a map was rounded up, it
      therefore counts up to one row and one column more as inside the image.
    - Its best results also start from the teacher's neck and head, see MODEL.DISTILL.INHERIT.

    The parts of the loss are L_distill by level, and "aux". Images are decoded one after another,
    without their padding. An image of 800 x 1333 pixels needs 1.8 GB (p2 to p6, C = 256, 100
    queries), of which 0.3 GB stay until the backward pass. Images without labels take no part.

    Args:
        weight (float): lambda, for all parts.
        aux_weight (float): factor of L_aux within the parts; 1 / weight gives the paper's L.
        aux_clip (float): upper bound of the norm of L_aux's gradient.
        heads (int): M; C must be a multiple of 2 M.
        fake_ratio (float): fake instances per real one; an image without real ones has one.
        max_queries (int): most queries of an image; real instances are never left out.
        jitter (float): a centre moves by up to this share of the box's width and height.
        detach_iters (int): first iterations, in which the student's maps get no gradient while
            decoder and projection learn.
    """

    needs_boxes = True
    starts_after = "detach_iters"

    def __init__(
        self,
        weight: float = 3.0,  # for two-stage detectors; 8 for one-stage detectors [authors]
        aux_weight: float = 1 / 3,  # its product with `weight` is 1 [authors]
        aux_clip: float = 1.0,  # not tuned; 0.01 with AdamW [authors]
        heads: int = 8,  # [authors]
        fake_ratio: float = 5.0,  # [authors]
        max_queries: int = 100,  # with p2; 300 without [authors]. Memory grows with it
        jitter: float = 0.3,  # [authors]
        detach_iters: int = 1000,  # of 90000 iterations [authors]
    ) -> None:
        super().__init__(weight)
        check_coefficients(
            aux_weight=aux_weight, aux_clip=aux_clip, fake_ratio=fake_ratio, jitter=jitter
        )
        check_integers(1, heads=heads, max_queries=max_queries)
        check_integers(detach_iters=detach_iters)
        if jitter > 0.5:  # a centre could leave its box
            raise ValueError(f"jitter must be at most 0.5, got {jitter!r}")
        self.aux_weight, self.aux_clip = aux_weight, aux_clip
        self.heads = heads
        self.fake_ratio, self.max_queries, self.jitter = fake_ratio, max_queries, jitter
        self.detach_iters = detach_iters

    def attach(self, channels: Dict[str, int], num_classes: int) -> None:
        """Makes the decoder and the student's projection.

        Raises:
            ConfigError: levels differ in channels, the heads cannot share them, or the number of
                classes is not known.
        """
        if not num_classes:
            raise ConfigError(
                "MODEL.DISTILL.LOSSES: icd needs the number of classes, and the student's head has "
                "no attribute num_classes"
            )
        if len(set(channels.values())) > 1:
            raise ConfigError(
                f"MODEL.DISTILL.IN_FEATURES: icd needs levels of equal channels, got {channels}"
            )
        width = next(iter(channels.values()))
        if width % (2 * self.heads):
            raise ConfigError(
                f"MODEL.DISTILL.ICD.HEADS: {width} channels are not a multiple of 2 x {self.heads}"
            )
        self.num_classes = num_classes
        code_length = num_classes + 2 * (CENTER_FEATURES + SCALES)
        self.decoder = Decoder(code_length, width, self.heads)
        self.student_value = projection(width)

    def forward(self, student: Maps, teacher: Maps, context: Context) -> Dict[str, Tensor]:
        """Level -> scalar in [0, 4], and "aux" -> scalar >= 0.

        Raises:
            ConfigError: there is no ground truth, or it has a class that the student lacks.
        """
        student, teacher = in_float(student, teacher)
        targets = context.require_targets(self.name)
        if context.iteration < self.detach_iters:
            # DistributedDataParallel waits for the adapters' gradients, so these become 0
            student = {level: maps.detach() + 0 * maps for level, maps in student.items()}
        distilled: Dict[str, List[Tensor]] = {level: [] for level in student}
        logits, labels, box_errors, instances = [], [], [], 0
        for image, target in enumerate(targets):
            cells = {lv: cut(maps, image, lv, context) for lv, maps in teacher.items()}
            sizes = (context.image_cells(lv, maps)[image] for lv, maps in teacher.items())
            grid = torch.cat(list(map(positions_like, cells.values(), sizes)))  # (L, C)
            queries = self.draw_queries(target, context.image_sizes[image]).to(grid)
            flat = [x.flatten(1).T for x in cells.values()]  # (l, C) for each level
            outputs, attention, values = self.decoder(
                queries.code(self.num_classes), torch.cat(flat), grid
            )
            shares = attention[:, : queries.real].detach().sum(1).T / max(queries.real, 1)  # (L, M)
            lengths = [len(x) for x in flat]
            for level, share, value in zip(
                cells, shares.split(lengths), values.detach().split(lengths)
            ):
                own = self.student_value(cut(student[level], image, level, context).flatten(1).T)
                error = (self.normalize(own) - self.normalize(value)).square().mean(-1)  # (l, M)
                distilled[level].append((error * share).sum() / self.heads)
            logits.append(outputs[:, 0])
            labels.append(torch.arange(len(outputs), device=grid.device) < queries.real)
            box_errors.append(queries.box_error(outputs[:, 1:].sigmoid()))
            instances += queries.real
        is_real = F.binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(labels).to(grid))
        box = torch.stack(box_errors).sum() / max(instances, 1)
        parts = {level: torch.stack(values).mean() for level, values in distilled.items()}
        return {**parts, "aux": self.aux_weight * self.clip(is_real + box)}

    def clip(self, aux: Tensor) -> Tensor:
        """L_aux, with the norm of its gradient over all of the decoder limited to `aux_clip`.

        The gradient is computed here, which frees the attention's memory before the backward pass.
        The backward pass then gets it from a term that is linear in the parameters and has the
        value 0, so that gradient scaling and DistributedDataParallel work as for any loss.
        """
        if not aux.requires_grad:
            return aux
        parameters = list(self.decoder.parameters())
        gradients = torch.autograd.grad(aux, parameters)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        scale = (self.aux_clip / norm.clamp_min(TINY)).clamp(max=1)
        linear = torch.stack([(p * g).sum() for p, g in zip(parameters, gradients)]).sum() * scale
        return aux.detach() + linear - linear.detach()

    def normalize(self, values: Tensor) -> Tensor:
        """LN: (l, C) -> (l, M, d)."""
        split = split_heads(values, self.heads)
        return F.layer_norm(split, split.shape[-1:])

    def draw_queries(self, target: Instances, size: Tuple[int, int]) -> Queries:
        """The real instances of an image, fake ones, and their moved centres.

        Args:
            target (Instances): ground truth of the image.
            size (int, int): height and width of the image in pixels.

        Returns:
            Queries: on the CPU, where the data loader leaves the ground truth: no GPU is waited
            for, and every device gets the same random numbers.
        """
        classes, boxes = target.gt_classes.cpu(), target.gt_boxes.tensor.cpu()
        if ((classes < 0) | (classes >= self.num_classes)).any():
            raise ConfigError(
                f"icd: the student predicts {self.num_classes} classes, but the ground truth has "
                f"the classes {sorted(set(classes.tolist()))}: set the head's NUM_CLASSES"
            )
        real = len(classes)
        wanted = min(max(1, int(real * (1 + self.fake_ratio))), max(self.max_queries, real))
        fakes = wanted - real
        image = torch.tensor([size[1], size[0]], dtype=boxes.dtype)
        mean, deviation, least, most = FAKE_SIDE
        half = (mean + deviation * torch.randn(fakes, 2)).clamp(least, most) / 2
        center = torch.rand(fakes, 2).clamp(*FAKE_CENTER)
        fake_boxes = torch.cat([center - half, center + half], 1).clamp(0, 1) * image.repeat(2)
        boxes = torch.cat([boxes, fake_boxes])
        classes = torch.cat([classes, torch.randint(self.num_classes, (fakes,))])
        low, high = boxes[:, :2], boxes[:, 2:]
        moves = self.jitter * (2 * torch.rand(wanted, 2) - 1)
        centers = (low + high) / 2 + moves * (high - low)
        return Queries(classes, boxes, centers, image, real)


def cut(maps: Tensor, image: int, level: str, context: Context) -> Tensor:
    """One image's cells of (N, C, H, W) maps: (C, h, w)."""
    h, w = context.cells(level, maps)[image]
    return maps[image, :, :h, :w]


def positions_like(cells: Tensor, size: Tuple[int, int]) -> Tensor:
    """P of a (C, h, w) map: (h w, C), C / 2 sinusoids of a cell's row and C / 2 of its column.

    Both are shares of the image, whose height and width in cells are `size`.
    """
    c, h, w = cells.shape
    rows = torch.arange(1, h + 1, device=cells.device, dtype=cells.dtype) / size[0]
    columns = torch.arange(1, w + 1, device=cells.device, dtype=cells.dtype) / size[1]
    y = sinusoids(rows, c // 2)[:, None].expand(h, w, c // 2)
    x = sinusoids(columns, c // 2)[None].expand(h, w, c // 2)
    return torch.cat([y, x], -1).flatten(0, 1)


def sinusoids(x: Tensor, features: int) -> Tensor:
    """Shares of the image (...) -> (..., features), sines and cosines in turn (Vaswani et al.)."""
    index = torch.arange(features, device=x.device)
    periods = 10000 ** (2 * (index // 2).to(x) / features)
    angles = 2 * math.pi * x[..., None] / periods
    return torch.where(index % 2 == 0, angles.sin(), angles.cos())


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(l, C) -> (l, M, d)."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads))


def projection(channels: int) -> nn.Linear:
    """C to C, with the initial weights of one of the three in `nn.MultiheadAttention`."""
    linear = nn.Linear(channels, channels)
    nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(0.5))  # as for a stack of 3 C x C
    nn.init.zeros_(linear.bias)
    return linear


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three linear layers with ReLU between them."""
    first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(hidden, outputs))
