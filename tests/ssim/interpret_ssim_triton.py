"""The Triton kernels on the CPU, in Triton's interpreter, which must be chosen before any import:
`TRITON_INTERPRET=1 pytest tests/interpret_ssim_triton.py`, as test_ssim_triton.py does."""

import pytest
import torch
from ssimkd.ssim import ssim_loss
from ssimkd.ssim import triton_loss as ssim_triton
from ssimkd.ssim.normalize import SCOPES, normalize_maps
from ssimkd.ssim.triton_loss import ssim_loss_triton
from torch.distributions import Normal, StudentT
from torch.library import opcheck

# Deviation of a gradient, as a share of its largest element. float32: in a few cells with windows
# of hardly any variance, where autograd in float32 deviates as much; the others round to nearest
# and, in the interpreter, to zero.
DEVIATION = {torch.float32: 4e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}

borders = pytest.mark.parametrize("border", ["renormalize", "zero"])


def maps(*shape, seed=0, dtype=torch.float32):
    """Two maps in [0, 1) that resemble each other, and offsets and scales that keep their means
    well above 0, where luminance amplifies any rounding."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.rand(2, *shape, generator=generator)
    offsets = -torch.rand(2, *shape[:2], generator=generator) - 0.5
    scales = torch.rand(2, *shape[:2], generator=generator) + 0.5
    student, teacher = x.to(dtype), ((x + noise) / 2).to(dtype)
    return student, teacher, (offsets[0], scales[0]), (offsets[1], scales[1])


def reference(student, teacher, student_affine, teacher_affine, sizes, **options):
    """What `ssim_loss_triton` computes, by `ssim_loss` on each image's own cells."""
    losses = []
    for image, (h, w) in enumerate(sizes):
        pair = []
        for x, affine in ((student, student_affine), (teacher, teacher_affine)):
            offset, scale = (a[image, :, None, None] for a in affine)
            pair.append(((x[image, :, :h, :w] - offset) * scale)[None])
        losses.append(ssim_loss(*pair, **options))
    return torch.stack(losses)


def check(student, teacher, student_affine, teacher_affine, sizes=None, **options):
    """Loss and gradients against float64; returns the loss."""
    inputs = [student, *student_affine]
    upstream = torch.arange(1.0, len(student) + 1)
    singles = [x.detach().requires_grad_() for x in inputs]
    losses = ssim_loss_triton(
        singles[0],
        teacher,
        tuple(singles[1:]),
        teacher_affine,
        None if sizes is None else torch.tensor(sizes),
        **options,
    )
    gradients = torch.autograd.grad((losses * upstream).sum(), singles)

    doubles = [x.detach().double().requires_grad_() for x in inputs]
    teacher_doubles = [a.double() for a in teacher_affine]
    expected = reference(
        doubles[0],
        teacher.double(),
        doubles[1:],
        teacher_doubles,
        sizes or [student.shape[2:]] * len(student),
        **options,
    )
    known = torch.autograd.grad((expected * upstream).sum(), doubles)
    assert (losses - expected).abs().max() < 1e-6
    assert gradients[0].dtype == student.dtype
    assert (gradients[0] - known[0]).abs().max() <= DEVIATION[student.dtype] * known[0].abs().max()
    for gradient, exact in zip(gradients[1:], known[1:]):
        assert (gradient - exact).abs().max() <= 1e-6 * max(known[0].abs().sum(), exact.abs().max())
    return losses


@borders
@pytest.mark.parametrize("window_size", [3, 5, 7, 9, 11])
def test_every_window(window_size, border):
    check(*maps(1, 1, 4, 6), window_size=window_size, border=border)


def test_a_window_of_one_cell_leaves_luminance():
    student, teacher, *affines = maps(1, 2, 3, 4)
    loss = ssim_loss_triton(student, teacher, *affines, window_size=1)
    x, y = (
        (m - a[:, :, None, None]) * b[:, :, None, None]
        for m, (a, b) in zip((student, teacher), affines)
    )
    luminance = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
    torch.testing.assert_close(loss, (1 - luminance.mean((1, 2, 3))) / 2)


@borders
def test_without_luminance(border):
    check(*maps(1, 1, 5, 8), window_size=5, border=border, exponents=(0.0, 1.0, 1.0))


@pytest.mark.parametrize("exponents", [(1.0, 1.0, 1.0), (0.0, 1.0, 1.0)])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_within_an_image_reaches_the_loss(which, exponents):
    student, teacher, *affines = maps(1, 1, 5, 8)
    (student, teacher)[which][0, 0, 2, 3] = float("nan")
    for x in (student, student.clone().requires_grad_()):
        loss = ssim_loss_triton(x, teacher, *affines, window_size=3, exponents=exponents)
        assert loss.isnan().all()


@borders
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (4, 7)])
def test_maps_smaller_than_the_window(size, border):
    check(*maps(1, 1, *size), border=border, window_size=5)


def test_a_map_of_several_programs(monkeypatch):
    monkeypatch.setattr(ssim_triton, "ROWS", 8)
    monkeypatch.setattr(ssim_triton, "BLOCK", 32)
    check(*maps(1, 1, 17, 35), window_size=5)


@borders
def test_cells_outside_an_image_take_no_part(border, monkeypatch):
    monkeypatch.setattr(ssim_triton, "ROWS", 8)
    monkeypatch.setattr(ssim_triton, "BLOCK", 32)
    options = dict(border=border, window_size=5)
    sizes = [(4, 9), (9, 3)]
    student, teacher, *affines = maps(2, 1, 9, 36)
    for image, (h, w) in enumerate(sizes):
        for x in (student, teacher):
            x[image, :, h:], x[image, :, :, w:] = float("nan"), float("nan")
    padded = student.requires_grad_()
    losses = ssim_loss_triton(padded, teacher, *affines, torch.tensor(sizes), **options)
    (gradient,) = torch.autograd.grad(losses.sum(), padded)
    for image, (h, w) in enumerate(sizes):
        crops = [x[image : image + 1, :, :h, :w].detach() for x in (student, teacher)]
        pairs = [[a[image : image + 1] for a in affine] for affine in affines]
        torch.testing.assert_close(check(*crops, *pairs, **options), losses[image : image + 1])
        assert gradient[image, :, h:].eq(0).all() and gradient[image, :, :, w:].eq(0).all()
        assert gradient[image, :, :h, :w].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@borders
def test_half_precision_maps_lose_nothing_but_their_own_rounding(dtype, border):
    check(*maps(1, 2, 5, 6, dtype=dtype), border=border, window_size=3)


def test_maps_need_not_be_contiguous():
    student, teacher, *affines = maps(2, 2, 5, 6)
    expected = ssim_loss_triton(student, teacher, *affines, window_size=3)
    wide = torch.zeros(2, 2, 9, 9)
    wide[..., :5, :6] = student
    last = teacher.contiguous(memory_format=torch.channels_last)
    assert ssim_loss_triton(wide[..., :5, :6], last, *affines, window_size=3).equal(expected)
    check(wide[..., :5, :6], last, *affines, window_size=3)


def test_flat_maps():
    student, teacher, *affines = maps(1, 3, 5, 6)
    student[:, 0], teacher[:, 0], teacher[:, 1] = 0.3, 0.7, 0.7
    affines[0][1][:, 2] = 0  # what `normalize` makes of a flat map
    check(student, teacher, *affines, window_size=5)


def test_equal_maps_cost_nothing():
    student, _, affine, _ = maps(1, 2, 5, 6)
    student.requires_grad_()
    loss = ssim_loss_triton(student, student, affine, affine, window_size=5)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.eq(0).all() and gradient.eq(0).all()


def features(kind, *shape):
    """Maps as of a feature pyramid."""
    torch.manual_seed(0)
    kinds = {"normal": Normal(0.0, 1.0), "outliers": StudentT(3.0)}
    distribution = kinds[kind]
    student = distribution.sample(shape)
    return student, (student + distribution.sample(shape)) / 2


def minmax(x, scope):
    """Offset and scale of `normalize_maps`, (N, C) or (N, 1)."""
    low, high = (f(SCOPES[scope], keepdim=True).flatten(1) for f in (x.amin, x.amax))
    return low, 1 / (high - low)


def whole_gradients(student, teacher, scope, dtype=torch.float64):
    """Gradient of SSIM of min-max maps, by the kernel and by autograd in `dtype`."""
    x, z = student.clone().requires_grad_(), student.to(dtype).requires_grad_()
    loss = ssim_loss_triton(x, teacher, minmax(x, scope), minmax(teacher, scope)).mean()
    known = ssim_loss(*normalize_maps(z, teacher.to(dtype), "minmax", scope, None))
    return torch.autograd.grad(loss, x)[0], torch.autograd.grad(known, z)[0]


@pytest.mark.parametrize("scope", ["channel", "image"])
@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_features_and_the_statistics_of_minmax_to_one_in_a_million(kind, scope):
    gradient, exact = whole_gradients(*features(kind, 1, 2, 7, 8), scope)
    assert (gradient - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_a_student_near_its_teacher_loses_less_than_autograd_does():
    student, _ = features("normal", 1, 1, 7, 8)
    teacher = student + 1e-4 * torch.randn_like(student)
    gradient, exact = whole_gradients(student, teacher, "channel")
    _, single = whole_gradients(student, teacher, "channel", torch.float32)
    assert (gradient - exact).abs().max() < 0.1 * (single - exact).abs().max()


# --- torch.compile ---


def operator_inputs():
    student, teacher, *affines = maps(2, 1, 3, 4)
    affine = torch.stack([a for pair in affines for a in pair])
    return student, teacher, affine, torch.tensor([[3, 4], [3, 4]])


def test_operators_are_what_the_compiler_takes_them_for():
    student, teacher, affine, sizes = operator_inputs()
    weights = ssim_triton._gaussian(3, 1.5)
    options = (weights, 1e-4, 9e-4, True, True, True)
    inputs = (student.requires_grad_(), teacher, affine.requires_grad_(), sizes)
    opcheck(ssim_triton._forward_op, (*inputs, *options))
    with torch.no_grad():
        slopes = ssim_triton._forward_op(*inputs, *options)[1]
        opcheck(ssim_triton._backward_op, (*inputs, slopes, torch.ones(2), weights))


def test_compiled_without_a_break_or_a_second_time_for_other_sizes():
    compiled = torch.compile(ssim_loss_triton, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for height, width in ((4, 5), (3, 7)):
            student, teacher, *affines = maps(2, 3, height, width)
            student.requires_grad_()
            results = []
            for function in (ssim_loss_triton, compiled):
                loss = function(student, teacher, *affines, window_size=3)
                results.append((loss, *torch.autograd.grad(loss.sum(), student)))
            for eager, traced in zip(*results):
                assert traced.equal(eager)
