"""What holds of the similarity and of its fast forms for any maps."""

import torch
from any_maps import EXAMPLES, LAYOUTS, layouts, maps, pairs, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from ssimkd.ssim import ssim_loss, ssim_map
from ssimkd.ssim.normalize import NORMALIZATIONS, SCOPES
from ssimkd.ssim.window import BORDERS

quick = settings(max_examples=25, **EXAMPLES)
options = st.fixed_dictionaries(
    {
        "window_size": st.sampled_from([1, 3, 7, 11]),
        "sigma": st.sampled_from([0.3, 1.5, 5.0]),
        "border": st.sampled_from(BORDERS),
        "exponents": st.sampled_from([(1, 1, 1), (0, 1, 1), (0, 0, 1), (1, 0.5, 2)]),
    }
)


@quick
@given(pairs(largest=1e15), options)
def test_similarity_lies_within_its_range(pair, option):
    found = ssim_map(*pair, **option)
    assert torch.isfinite(found).all() and found.abs().max() <= 1 + 1e-6
    assert -1e-6 <= ssim_loss(*pair, **option) <= 1 + 1e-6


@quick
@given(pairs(largest=1.0), options)
def test_similarity_is_symmetric(pair, option):
    a, b = (ssim_map(*x, **option) for x in (pair, pair[::-1]))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@quick
@given(maps(), options)
def test_equal_maps_have_similarity_one(x, option):
    found = ssim_map(x, x.clone(), **option)
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)


@quick
@given(pairs(largest=1e15), options)
def test_the_gradient_is_finite(pair, option):
    student = pair[0].clone().requires_grad_()
    ssim_loss(student, pair[1], **option).backward()
    assert torch.isfinite(student.grad).all()


@quick
@given(pairs(), options, layouts, layouts)
def test_memory_layout_changes_nothing(pair, option, a, b):
    found = ssim_map(LAYOUTS[a](pair[0]), LAYOUTS[b](pair[1]), **option)
    torch.testing.assert_close(found, ssim_map(*pair, **option), atol=1e-5, rtol=0)


@quick
@given(pairs(largest=1.0), options)
def test_float32_is_float64_but_for_rounding(pair, option):
    exact = ssim_map(*(x.double() for x in pair), **option)
    found = ssim_map(*pair, **option)
    assert exact.dtype == torch.float64 and found.dtype == torch.float32
    # With beta = gamma there is no root. Else sd = sqrt(var) makes of a rounding of 1e-7 one of
    # 3e-4, as large as C3, in windows where one map is flat and the other is not.
    _, beta, gamma = option["exponents"]
    tolerance = 2e-3 if beta == gamma else 5e-2
    torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=0)


normalized = st.tuples(st.sampled_from(sorted(NORMALIZATIONS)), st.sampled_from(sorted(SCOPES)))


@quick
@given(pairs(shape=shapes, largest=10.0), options, normalized, layouts, layouts)
def test_the_chosen_backend_is_the_definition(pair, option, kind, a, b):
    normalize, scope = kind
    n, _, h, w = pair[0].shape
    sizes = [(h, w)] * (n - 1) + [((h + 1) // 2, w)]
    results = []
    for backend in ("auto", "definition"):
        student = LAYOUTS[a](pair[0]).detach().requires_grad_()
        how = dict(sizes=sizes, normalize=normalize, normalize_scope=scope, backend=backend)
        value = ssim_loss(student, LAYOUTS[b](pair[1]), **how, **option)
        results.append((value.detach(), torch.autograd.grad(value, student)[0]))
    (value, gradient), (expected, slope) = results
    torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4)
    assert torch.isfinite(gradient).all()
    limit = 1e-2 * float(slope.abs().max()) + 1e-9  # what "none" loses on a map with a far cell
    torch.testing.assert_close(gradient, slope, atol=limit, rtol=0)
