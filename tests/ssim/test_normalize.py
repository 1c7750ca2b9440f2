import numpy as np
import pytest
import torch
from ssimkd.ssim.normalize import SCOPES, normalize_maps
from torch.autograd import gradcheck

KINDS = ["minmax", "teacher_range", "standardize", "none"]
RESCALING = KINDS[:3]
ALL_SCOPES = ["channel", "image", "batch"]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_rescaling = pytest.mark.parametrize("kind", RESCALING)
every_scope = pytest.mark.parametrize("scope", ALL_SCOPES)
with_and_without_mask = pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])


def pair(n=2, c=3, h=4, w=5, dtype=torch.float64):
    """Student and teacher maps whose channels and images differ in mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, n, c, h, w, generator=generator)
    scale = torch.arange(1.0, n * c + 1).view(n, c, 1, 1)
    return (x * scale + scale).to(dtype), (0.5 * y * scale - 2).to(dtype)


def mask(n=2, h=4, w=5):
    """Images of 3 x 5 and 4 x 2 cells on a map of 4 x 5."""
    inside = torch.zeros(n, 1, h, w, dtype=torch.bool)
    inside[0, :, :3, :] = True
    inside[1, :, :, :2] = True
    return inside


def pool(x, inside, n, c, scope):
    """The values that share one statistic with channel c of image n."""
    images = range(len(x)) if scope == "batch" else [n]
    channels = [c] if scope == "channel" else range(x.shape[1])
    return np.concatenate([x[i, k][inside[i, 0]] for i in images for k in channels])


def reference(student, teacher, kind, scope, inside):
    """Each channel of each image by the numbers of its pool."""
    maps = student.numpy(), teacher.numpy()
    results = np.empty_like(maps[0]), np.empty_like(maps[1])
    for n, c in np.ndindex(*student.shape[:2]):
        for x, result in zip(maps, results):
            source = maps[1] if kind == "teacher_range" else x
            values = pool(source, inside.numpy(), n, c, scope)
            offset, width = {
                "minmax": (values.min(), values.max() - values.min()),
                "teacher_range": (values.min(), values.max() - values.min()),
                "standardize": (values.mean(), values.std()),
                "none": (0, 1),
            }[kind]
            result[n, c] = (x[n, c] - offset) / width
    return tuple(torch.from_numpy(result) for result in results)


@with_and_without_mask
@every_scope
@every_kind
def test_equals_numpy(kind, scope, masked):
    student, teacher = pair()
    inside = mask() if masked else torch.ones_like(mask())
    expected = reference(student, teacher, kind, scope, inside)
    result = normalize_maps(student, teacher, kind, scope, inside if masked else None)
    torch.testing.assert_close(result, expected)


def test_none_returns_the_maps_themselves():
    student, teacher = pair()
    result = normalize_maps(student, teacher, "none", "channel", mask())
    assert result[0] is student and result[1] is teacher


@pytest.mark.parametrize("scope", ["channel", "image"])
@every_kind
def test_images_are_independent(kind, scope):
    student, teacher = pair()
    batched = normalize_maps(student, teacher, kind, scope, mask())
    for n in range(2):
        one = slice(n, n + 1)
        alone = normalize_maps(student[one], teacher[one], kind, scope, mask()[one])
        torch.testing.assert_close(tuple(x[one] for x in batched), alone)


@every_scope
@every_kind
def test_cells_outside_the_mask_do_not_matter(kind, scope):
    student, teacher = (x.float().requires_grad_() for x in pair())
    inside = mask().expand_as(student)
    other_student, other_teacher = (
        torch.where(inside, x, 1e6 - 3e6 * x) for x in (student, teacher)
    )
    result = normalize_maps(student, teacher, kind, scope, mask())
    other = normalize_maps(other_student, other_teacher, kind, scope, mask())
    for x, y in zip(result, other):
        assert torch.equal(x[inside], y[inside])
    (gradient,) = torch.autograd.grad(result[0][inside].pow(3).sum(), student)
    assert gradient[inside].abs().max() > 0
    assert gradient[~inside].abs().max() == 0


@pytest.mark.parametrize("value", [0.0, 0.7, -2.5])
@with_and_without_mask
@every_scope
@every_rescaling
def test_flat_maps_become_zero_without_gradient(kind, scope, masked, value):
    student = torch.full((2, 3, 4, 5), value, requires_grad=True)
    inside = mask() if masked else None
    result, teacher = normalize_maps(student, student.detach().clone(), kind, scope, inside)
    assert torch.equal(result, torch.zeros_like(result))
    assert torch.equal(teacher, torch.zeros_like(teacher))
    (gradient,) = torch.autograd.grad((result - 1).square().sum(), student)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_flat_teacher_has_no_range_for_its_student():
    student, _ = pair()
    student.requires_grad_()
    teacher = torch.full_like(student, 2.0)
    result, _ = normalize_maps(student, teacher, "teacher_range", "channel", None)
    (gradient,) = torch.autograd.grad(result.sum(), student)
    assert torch.equal(result, torch.zeros_like(result))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@with_and_without_mask
@every_scope
@pytest.mark.parametrize("kind", ["minmax", "standardize"])
def test_scale_and_offset_of_each_map_do_not_matter(kind, scope, masked):
    student, teacher = pair()
    inside = mask() if masked else None
    expected = normalize_maps(student, teacher, kind, scope, inside)
    result = normalize_maps(3 * student - 5, 0.1 * teacher + 7, kind, scope, inside)
    torch.testing.assert_close(result, expected)


@with_and_without_mask
@every_scope
def test_teacher_range_ignores_what_both_maps_share_and_keeps_the_rest(scope, masked):
    student, teacher = pair()
    inside = mask() if masked else None
    expected = normalize_maps(student, teacher, "teacher_range", scope, inside)
    common = normalize_maps(3 * student - 5, 3 * teacher - 5, "teacher_range", scope, inside)
    torch.testing.assert_close(common, expected)
    doubled, _ = normalize_maps(2 * student, teacher, "teacher_range", scope, inside)
    zero, _ = normalize_maps(0 * student, teacher, "teacher_range", scope, inside)
    # with the teacher's minimum m and width w: (2 s - m) / w + m / w = 2 ((s - m) / w + m / w)
    torch.testing.assert_close(doubled - zero, 2 * (expected[0] - zero))


@with_and_without_mask
@every_scope
@every_kind
def test_gradient_equals_finite_differences(kind, scope, masked):
    student, teacher = pair()
    inside = mask() if masked else None

    def normalized(x):
        return normalize_maps(x, teacher, kind, scope, inside)[0]

    assert gradcheck(normalized, (student.requires_grad_(),))


@every_scope
@pytest.mark.parametrize("kind", ["minmax", "standardize"])
def test_gradient_flows_through_the_statistics(kind, scope):
    student, teacher = pair()
    student.requires_grad_()
    result, _ = normalize_maps(student, teacher, kind, scope, None)
    (gradient,) = torch.autograd.grad((result**3).sum(), student)
    # f(a x + b) = f(x): no change along x's offset nor along x's scale
    for direction in (torch.ones_like(student), student.detach()):
        slope = (gradient * direction).sum(SCOPES[scope])
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [30.1, 100.3, 1e4])
@pytest.mark.parametrize("size", [(3, 4), (8, 12), (40, 60), (100, 152)], ids=str)
@pytest.mark.parametrize("scope", ["channel", "image", "batch"])
def test_large_constants_standardize_to_zero_without_gradient(scope, size, value):
    student = torch.full((2, 3, *size), value, requires_grad=True)
    result, _ = normalize_maps(student, student.detach().clone(), "standardize", scope, None)
    noise = torch.randn(student.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((result * noise).sum(), student)
    assert result.abs().max() == 0
    assert gradient.abs().max() == 0


def test_standardize_ignores_overflow_outside_the_mask():
    x = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    inside[..., 2:] = False
    for outside in (1e20, float("nan")):
        other = x.masked_fill(~inside, outside)
        for kind in ("minmax", "standardize"):
            s, _ = normalize_maps(x, x, kind, "channel", inside)
            o, _ = normalize_maps(other, x, kind, "channel", inside)
            assert torch.equal(s[..., :2], o[..., :2]), (kind, outside)
