"""ICD: its values equal those of loops; what each part trains; which instances are drawn."""

import math

import numpy as np
import pytest
import torch
from loss_cases import CLASSES, COUNTS, SIZES, STRIDES, batch, make_loss, run
from loss_cases import targets as make_targets
from ssimkd.losses import Context, ICDLoss
from ssimkd.losses.icd import Queries, cut, positions_like, sinusoids

CHANNELS, HEADS = 8, 2


def make(levels=STRIDES, **options):
    """A loss whose every parameter matters, with its iterations without gradient over."""
    settings = dict(aux_weight=1.0, heads=HEADS, detach_iters=0, max_queries=12)
    return make_loss("icd", CHANNELS, levels, **{**settings, **options})


def maps(counts=COUNTS, sizes=SIZES, strides=STRIDES):
    return batch(sizes, counts, strides, CHANNELS)


def distilled(parts):
    return sum(value for name, value in parts.items() if name != "aux")


# --- values ---


class Loops:
    """The loss of one image from its definition, in NumPy, cell by cell."""

    def __init__(self, loss):
        self.weights = {k: v.numpy() for k, v in loss.state_dict().items()}

    def linear(self, name, x):
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def mlp(self, name, x):
        x = np.maximum(self.linear(f"{name}.0", x), 0)
        return self.linear(f"{name}.4", np.maximum(self.linear(f"{name}.2", x), 0))

    def norm(self, x, name=None):
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        if name is None:
            return x
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    @staticmethod
    def waves(x, features):
        angles = [2 * math.pi * x / 10000 ** (2 * (i // 2) / features) for i in range(features)]
        return [math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angles)]

    def code(self, queries, i):
        x1, y1, x2, y2 = queries.boxes[i].tolist()
        code = [float(c == queries.classes[i]) for c in range(CLASSES)]
        for axis in (0, 1):
            code += self.waves(float(queries.centers[i, axis] / queries.image[axis]), 128)
        for side in (x2 - x1, y2 - y1):
            scale = sum(side >= limit for limit in (64, 128, 256, 512))
            code += [float(k == scale) for k in range(5)]
        return np.array(code)

    def sides(self, queries, i):
        """Targets as shares of the image, and what their errors are divided by."""
        (x1, y1, x2, y2), (x, y) = queries.boxes[i].tolist(), queries.centers[i].tolist()
        w, h = queries.image.tolist()
        units = [(x2 - x1) / w, (y2 - y1) / h] * 2
        return np.array([(x - x1) / w, (y - y1) / h, (x2 - x) / w, (y2 - y) / h]), np.array(units)

    def image(self, queries, student, teacher):
        """Distillation by level, cross-entropies of the queries, box errors of the real ones."""
        cells, positions, owner = [], [], []
        for level, m in teacher.items():
            c, h, w = m.shape
            for row in range(h):
                for column in range(w):
                    cells.append((m[:, row, column], student[level][:, row, column]))
                    y, x = (row + 1) / h, (column + 1) / w
                    positions.append(self.waves(y, c // 2) + self.waves(x, c // 2))
                    owner.append(level)
        d = CHANNELS // HEADS
        heads = [slice(j * d, (j + 1) * d) for j in range(HEADS)]
        values = [self.linear("decoder.value", t) for t, _ in cells]
        own = [self.linear("student_value", s) for _, s in cells]
        keys = [
            self.linear("decoder.key", t + self.linear("decoder.position", np.array(p)))
            for (t, _), p in zip(cells, positions)
        ]
        loss = dict.fromkeys(teacher, 0.0)
        entropies, errors = [], []
        for i in range(len(queries.classes)):
            query = self.mlp("decoder.encoder", self.code(queries, i))
            asked = self.linear("decoder.query", query)
            found = np.zeros(CHANNELS)
            for head in heads:
                scores = np.array([asked[head] @ key[head] for key in keys]) / math.sqrt(d)
                attention = np.exp(scores - scores.max())
                attention /= attention.sum()
                found[head] = sum(a * v[head] for a, v in zip(attention, values))
                for a, s, t, level in zip(attention, own, values, owner):
                    error = ((self.norm(s[head]) - self.norm(t[head])) ** 2).mean()
                    if i < queries.real:
                        loss[level] += a * error / HEADS / queries.real
            query = self.norm(query + self.linear("decoder.out", found), "decoder.attended")
            hidden = np.maximum(self.linear("decoder.feed_forward.0", query), 0)
            query = query + self.linear("decoder.feed_forward.2", hidden)
            answer = 1 / (
                1 + np.exp(-self.mlp("decoder.predictor", self.norm(query, "decoder.decoded")))
            )
            entropies.append(-math.log(answer[0] if i < queries.real else 1 - answer[0]))
            if i < queries.real:
                sides, units = self.sides(queries, i)
                errors.append((abs(answer[1:] - sides) / units).sum())
        return loss, entropies, errors


def test_values_are_those_of_loops():
    loss = make()
    student, teacher, context = maps()
    drawn, draw = [], loss.draw_queries
    double = torch.zeros(0, dtype=torch.float64)
    loss.draw_queries = lambda *args: drawn.append(draw(*args).to(double)) or drawn[-1]
    found = run(loss, student, teacher, context)
    by_image = []
    for n in range(len(SIZES)):
        cut = [{}, {}]
        for level in STRIDES:
            h, w = context.cells(level, student[level])[n]
            for own, whose in zip(cut, (student, teacher)):
                own[level] = whose[level][n, :, :h, :w].detach().numpy()
        by_image.append(Loops(loss).image(drawn[n], *cut))
    levels, entropies, errors = zip(*by_image)
    expected = {level: np.mean([x[level] for x in levels]) for level in STRIDES}
    # means over all queries and over all real instances of the batch
    expected["aux"] = np.mean(np.concatenate(entropies)) + np.mean(np.concatenate(errors))
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sign", [1, -1], ids=["equal", "opposite"])
def test_equal_values_cost_nothing_and_opposite_ones_four(sign):
    loss = make()
    student, _, context = maps(counts=[1, 2, 3, 1])
    teacher = {level: x.detach().clone() for level, x in student.items()}
    for own, other in zip(loss.student_value.parameters(), loss.decoder.value.parameters()):
        own.data = sign * other.data
    value = distilled(run(loss, student, teacher, context))
    # unit variance (but for the 1e-5 beside it) and opposite sign: mean (2 v)^2 = 4
    assert value.item() == pytest.approx(0 if sign == 1 else 4, rel=1e-3, abs=1e-12)
    if sign == 1:
        wanted = [*student.values(), *loss.student_value.parameters()]
        assert all(x.abs().max() < 1e-12 for x in torch.autograd.grad(value, wanted))


def test_images_without_instances_have_no_distillation():
    student, teacher, context = maps([0, 0], SIZES[:2])
    parts = run(make(), student, teacher, context)
    assert distilled(parts) == 0 and parts["aux"] > 0
    gradients = torch.autograd.grad(sum(parts.values()), list(student.values()))
    assert not any(gradient.any() for gradient in gradients)


# --- gradients ---


def test_each_part_trains_what_it_is_for():
    loss = make()
    student, teacher, context = maps()
    wanted = {
        "student": list(student.values()),
        "projection": list(loss.student_value.parameters()),
        "decoder": list(loss.decoder.parameters()),
    }
    parts = run(loss, student, teacher, context)
    assert list(parts) == ["p3", "p5", "aux"]
    for name, value in parts.items():
        reached = {
            whose: [
                gradient is not None and bool(gradient.any())
                for gradient in torch.autograd.grad(value, xs, retain_graph=True, allow_unused=True)
            ]
            for whose, xs in wanted.items()
        }
        assert any(reached["decoder"]) == (name == "aux")
        assert any(reached["student"]) == all(reached["projection"]) == (name != "aux")
        if name != "aux":  # the part of a level trains the maps of that level alone
            assert reached["student"] == [level == name for level in STRIDES]


def test_the_gradient_of_the_auxiliary_loss_is_that_of_differences():
    loss = make(aux_clip=1e9)
    inputs, parameters = maps([2, 0], [(16, 40), (9, 16)]), tuple(loss.decoder.parameters())
    torch.autograd.gradcheck(lambda *_: run(loss, *inputs)["aux"], parameters, fast_mode=True)


def test_the_norm_of_the_auxiliary_gradient_is_clipped():
    def gradient(clip):
        loss = make(aux_clip=clip)
        value = run(loss, *maps())["aux"]
        gradients = torch.autograd.grad(value, list(loss.decoder.parameters()))
        return value, torch.cat([x.flatten() for x in gradients])

    value, plain = gradient(1e9)
    for share in (0.1, 0.9, 1.1):
        clipped_value, clipped = gradient(share * plain.norm().item())
        torch.testing.assert_close(clipped_value, value)
        torch.testing.assert_close(clipped, plain * min(share, 1))


def test_in_the_first_iterations_only_decoder_and_projection_learn():
    loss = make(detach_iters=10)
    student, teacher, context = maps()
    for context.iteration in (0, 9, 10):
        parts = run(loss, student, teacher, context)
        torch.testing.assert_close(parts, run(make(), student, teacher, context))
        wanted = [*student.values(), loss.student_value.weight, loss.decoder.key.weight]
        *to_student, to_projection, to_decoder = torch.autograd.grad(sum(parts.values()), wanted)
        # zeros rather than None: an adapter before the loss takes part in every step
        assert all(bool(x.any()) == (context.iteration == 10) for x in to_student)
        assert to_projection.any() and to_decoder.any()


# --- queries ---


@pytest.mark.parametrize(
    ("real", "ratio", "most", "queries"),
    [(0, 5, 100, 1), (3, 5, 100, 18), (3, 0.5, 100, 4), (30, 5, 100, 100), (120, 5, 100, 120)],
)
def test_fake_instances_per_real_one(real, ratio, most, queries):
    loss = make(fake_ratio=ratio, max_queries=most)
    (target,) = make_targets([(60, 90)], [real])
    drawn = loss.draw_queries(target, (60, 90))
    assert drawn.real == real
    assert len(drawn.classes) == len(drawn.boxes) == len(drawn.centers) == queries
    assert torch.equal(drawn.classes[:real], target.gt_classes)
    assert torch.equal(drawn.boxes[:real], target.gt_boxes.tensor)


def test_fake_instances_lie_in_the_image_and_centres_in_their_boxes():
    loss = make(fake_ratio=400, max_queries=9999, jitter=0.3)
    (target,) = make_targets([(60, 90)], [10])
    drawn = loss.draw_queries(target, (60, 90))
    low, high = drawn.boxes[10:, :2], drawn.boxes[10:, 2:]
    assert (low >= 0).all() and (low < high).all() and (high <= drawn.image).all()
    assert drawn.image.tolist() == [90, 60]
    sides = (high - low) / drawn.image
    assert sides.max() <= 0.6 + 1e-6
    # normal, 0.2 +- 0.2, cut to [0.002, 0.6]: mean 0.212; the image's edges cut some off
    assert 0.15 < sides.mean() < 0.22
    assert drawn.classes[10:].bincount(minlength=CLASSES).min() > 4000 / CLASSES * 0.8
    middles = (drawn.boxes[:, :2] + drawn.boxes[:, 2:]) / 2
    moves = (drawn.centers - middles) / (drawn.boxes[:, 2:] - drawn.boxes[:, :2])
    assert moves.abs().max() <= 0.3 + 1e-4 and moves.abs().max() > 0.29
    assert abs(moves.mean()) < 0.01


def test_the_code_tells_only_the_range_of_a_side():
    sides = torch.tensor([0.0, 31, 63, 64, 127, 128, 256, 511, 512, 2000])
    boxes = torch.stack([torch.zeros(10), torch.zeros(10), sides, sides], 1)
    queries = Queries(torch.zeros(10).long(), boxes, boxes[:, 2:] / 2, torch.ones(2), 10)
    assert queries.code(3)[:, -5:].argmax(1).tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("mask_padding", [True, False])
def test_a_cell_has_the_position_of_its_place_in_the_image(mask_padding):
    """Queries are coded by their place in the image, with or without its padding."""
    sizes, level = [(64, 128), (64, 64)], "p4"
    context = Context(sizes, {level: 16}, [], mask_padding=mask_padding)
    maps = torch.zeros(2, CHANNELS, 4, 8)
    for image, width in enumerate((8, 4)):
        size = context.image_cells(level, maps)[image]
        cells = cut(maps, image, level, context)
        column = positions_like(cells, size).unflatten(0, cells.shape[1:])[0, width - 1]
        expected = sinusoids(torch.tensor(1.0), CHANNELS // 2)  # the right edge of the image
        assert torch.allclose(column[CHANNELS // 2 :], expected, atol=1e-5)


# --- errors ---


def test_errors_name_what_to_change():
    student, teacher, context = maps()
    context.targets[0].gt_classes[0] = CLASSES
    with pytest.raises(ValueError, match=rf"predicts {CLASSES} classes, .* \[.*{CLASSES}\]"):
        run(make(), student, teacher, context)
    with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.IN_FEATURES: .*'p3': 8, 'p4': 16"):
        ICDLoss().attach({"p3": 8, "p4": 16}, CLASSES)
    with pytest.raises(ValueError, match=r"MODEL\.DISTILL\.ICD\.HEADS: 24 .* 2 x 8"):
        ICDLoss().attach({"p3": 24}, CLASSES)
    with pytest.raises(ValueError, match=r"icd needs the number of classes"):
        ICDLoss().attach({"p3": 16}, 0)
    with pytest.raises(ValueError, match="jitter must be at most 0.5"):
        ICDLoss(jitter=0.6)
