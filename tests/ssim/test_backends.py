"""Every fast backend of `ssim_loss` against the definition in float64, and its inputs."""

import gc
import threading
from functools import partial

import pytest
import torch
from ssimkd.ssim import analytic, compiled, loss, one_pass, ssim_loss
from ssimkd.ssim.normalize import AFFINE, SCOPES
from ssimkd.ssim.window import Window, window_matrices
from torch.utils._python_dispatch import TorchDispatchMode

BORDERS = ("renormalize", "reflect", "valid")
SIZES = [(1, 1), (1, 7), (5, 4), (13, 21), (47, 70)]  # 47 x 70 is cut into blocks along both axes
PADDED = [(14, 22), (9, 5), (14, 22), (3, 4)]


@pytest.fixture(params=["analytic", "cpp"])
def backend(request):
    """Each fast backend for CPUs; interpret_triton.py has the one for GPUs."""
    if request.param == "cpp" and compiled.library() is None:
        pytest.skip("no C++ compiler")
    return request.param


def related_maps(*shape, seed=0, dtype=torch.float32):
    """Two stacks of maps that agree in part, each channel of another scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, *shape, generator=generator)
    scale = torch.arange(1.0, shape[1] + 1).view(-1, 1, 1)
    return (scale * x + scale).to(dtype), (x + noise - scale).to(dtype)


def evaluate(student, teacher, **options):
    """Value and gradient of the loss."""
    student = student.detach().requires_grad_()
    value = ssim_loss(student, teacher, **{"normalize": "minmax", **options})
    return value.detach(), torch.autograd.grad(value, student)[0]


def assert_equals_definition(student, teacher, backend, rtol=1e-6, **options):
    """A backend in float32 against the definition in float64, relative to the largest gradient.

    Where the loss itself rounds badly (means of few cells) the definition in float32 limits it.
    """
    value, gradient = evaluate(student, teacher, backend=backend, **options)
    by_definition = partial(evaluate, backend="definition", **options)
    exact_value, exact = by_definition(student.double(), teacher.double())
    _, single = by_definition(student.float(), teacher.float())
    assert value.dtype == torch.float32 and gradient.dtype == student.dtype
    assert abs(value - exact_value) < 1e-6
    limit = max(rtol * exact.abs().max(), 4 * (single - exact).abs().max())
    assert (gradient - exact).abs().max() <= limit + 1e-12


# --- equal to the definition ---


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("window_size", [3, 11])
def test_every_window_and_border(backend, border, window_size, size):
    options = dict(border=border, window_size=window_size)
    assert_equals_definition(*related_maps(2, 3, *size), backend, 2e-6, **options)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", AFFINE)
@pytest.mark.parametrize(
    "sizes", [None, PADDED, [(13, 20)] * 4], ids=["whole", "padded", "cropped"]
)
def test_every_normalisation_exactly_in_float64(normalize, scope, sizes):
    student, teacher = related_maps(4, 3, 14, 22, dtype=torch.float64)
    for border in BORDERS:
        options = dict(normalize=normalize, normalize_scope=scope, sizes=sizes, border=border)
        found = evaluate(student, teacher, backend="analytic", **options)
        expected = evaluate(student, teacher, backend="definition", **options)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", AFFINE)
@pytest.mark.parametrize("border", BORDERS)
def test_every_normalisation_of_padded_images(backend, border, normalize, scope):
    options = dict(border=border, normalize=normalize, normalize_scope=scope, sizes=PADDED)
    assert_equals_definition(*related_maps(4, 3, 14, 22), backend, 1e-5, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"sigma": 0.7},
        {"k1": 0.2},
        {"k2": 0.3},
        {"data_range": 3.0},
        {"window_size": 7, "sigma": 4.0, "k1": 0.1},
        {"window_size": 37, "sigma": 9.0},  # wider than a vector of the C++ form
    ],
    ids=str,
)
def test_options_reach_the_backend(backend, options):
    maps = related_maps(1, 2, 30, 40)
    assert_equals_definition(*maps, backend, **options)
    changed, plain = (evaluate(*maps, backend=backend, **o)[0] for o in (options, {}))
    assert abs(changed - plain) > 1e-6


def test_a_map_of_fpn_size_deviates_by_a_millionth(backend):
    student, noise = torch.randn(2, 1, 32, 50, 84, generator=torch.Generator().manual_seed(0))
    assert_equals_definition(student, student + noise, backend)


def test_maps_that_nearly_agree_keep_their_digits(backend):
    # differences of means and of variances, not of products: the definition is off by 5 % here
    student, noise = torch.rand(2, 1, 8, 25, 42, generator=torch.Generator().manual_seed(0))
    teacher = student + 1e-3 * noise
    _, gradient = evaluate(student, teacher, normalize="none", backend=backend)
    _, exact = evaluate(student.double(), teacher.double(), normalize="none", backend="definition")
    assert (gradient - exact).abs().max() < 1e-3 * exact.abs().max()


def test_equal_maps_cost_nothing(backend):
    _, teacher = related_maps(2, 3, 9, 10)
    value, gradient = evaluate(teacher, teacher, backend=backend)
    assert abs(value) < 1e-12 and gradient.abs().max() < 1e-7


@pytest.mark.parametrize("dense", [False, True], ids=["picked rows", "all rows"])
@pytest.mark.parametrize("scope", SCOPES)
def test_equal_extremes_share_their_gradient(backend, scope, dense, monkeypatch):
    if dense:  # as on a GPU
        monkeypatch.setattr(one_pass, "_rows_that_hold", lambda rows, end: (slice(None),) * 2)
    student, teacher = related_maps(2, 3, 12, 13)
    student = student.clamp(-0.5, 1.5).round(decimals=1)  # many minima, many maxima
    options = dict(normalize_scope=scope, sizes=[(12, 13), (7, 13)])
    assert_equals_definition(student, teacher, backend, 2e-6, **options)


@pytest.mark.parametrize("normalize", AFFINE)
def test_flat_maps(backend, normalize):
    student, teacher = related_maps(2, 3, 9, 10)
    flat_student, flat_teacher = student.clone(), teacher.clone()
    flat_student[0, 1] = 0.7
    flat_teacher[1, 2] = -3.0
    for maps in ((flat_student, teacher), (student, flat_teacher)):
        assert_equals_definition(*maps, backend, 5e-6, normalize=normalize)


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_hostile_raw_maps_stay_in_range(backend, size):
    student, teacher = related_maps(2, 3, 9, 10)
    for maps in ((size * student, teacher), (size * student, -size * student)):
        value, gradient = evaluate(*maps, normalize="none", backend=backend)
        assert -1e-6 <= value <= 1 + 1e-6
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("normalize", AFFINE)
@pytest.mark.parametrize("name", ["definition", "analytic", "cpp"])
def test_nan_reaches_value_and_gradient(name, normalize, which):
    if name == "cpp" and compiled.library() is None:
        pytest.skip("no C++ compiler")
    student, teacher = related_maps(1, 2, 9, 10)
    (student if which == "student" else teacher)[0, 1, 4, 5] = float("nan")
    value, gradient = evaluate(student, teacher, normalize=normalize, backend=name)
    assert value.isnan() and gradient[0, 1].isnan().any() and gradient[0, 0].isfinite().all()


def test_matrices_are_the_window_of_the_definition():
    for size in SIZES:
        for border in (*BORDERS, "zero"):
            down, across = window_matrices(*size, 11, 1.5, border)
            x = torch.randn(1, 1, *size, dtype=torch.float64)
            window = Window(size, 11, 1.5, border, x)
            torch.testing.assert_close(down @ x @ across.t(), window.average(window.pad(x)))


# --- inputs ---


LAYOUTS = {
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "cropped": lambda m: torch.nn.functional.pad(m, (1, 2, 3, 4))[..., 3:-4, 1:-2],
    "turned": lambda m: m.transpose(2, 3).contiguous().transpose(2, 3),
    "of_a_batch": lambda m: torch.stack([m, m], 1)[:, 0],
}


@pytest.mark.parametrize("sizes", [None, [(14, 22), (9, 5)]], ids=["whole", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_in_memory_does_not_matter(backend, layout, sizes):
    maps, options = related_maps(2, 3, 14, 22), dict(backend=backend, sizes=sizes)
    expected = evaluate(*maps, **options)
    torch.testing.assert_close(evaluate(*map(layout, maps), **options), expected)


@pytest.mark.parametrize("name", ["definition", "analytic", "cpp", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_compared_in_float32(name, dtype):
    if name == "cpp" and compiled.library() is None:
        pytest.skip("no C++ compiler")
    maps = related_maps(2, 3, 14, 22, dtype=dtype)
    options = dict(backend=name, sizes=[(14, 22), (9, 5)])
    value, gradient = evaluate(*maps, **options)
    expected, expected_gradient = evaluate(*(m.float() for m in maps), **options)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=1e-2, atol=1e-6)


def test_autocast_changes_nothing(backend):
    maps = related_maps(2, 3, 14, 22)
    expected = evaluate(*maps, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = evaluate(*maps, backend=backend)
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize(
    "use, default, restored",
    [
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.set_default_device, "meta", None),  # one that is not the maps'
    ],
)
@pytest.mark.parametrize("normalize", ["minmax", "none"])
def test_defaults_of_torch_change_nothing(backend, normalize, use, default, restored):
    maps = related_maps(2, 3, 14, 22)
    expected = evaluate(*maps, normalize=normalize, backend=backend)
    kept = (window_matrices, analytic._windows, compiled._axes)
    for function in kept:
        function.cache_clear()
    use(default)
    try:
        found = evaluate(*maps, normalize=normalize, backend=backend)
    finally:
        use(restored)
        for function in kept:
            function.cache_clear()
    assert all(map(torch.equal, found, expected))


def test_padding_gets_no_gradient_whatever_it_holds(backend):
    student, teacher = related_maps(2, 3, 14, 22)
    options = dict(backend=backend, sizes=[(14, 22), (9, 5)])
    expected = evaluate(student, teacher, **options)
    for m in (student, teacher):
        m[1, :, 9:], m[1, :, :, 5:] = float("nan"), 1e9
    value, gradient = evaluate(student, teacher, **options)
    assert value == expected[0] and gradient.equal(expected[1])
    assert gradient[1, :, 9:].eq(0).all() and gradient[1, :, :, 5:].eq(0).all()
    assert gradient[1, :, :9, :5].ne(0).all()


def test_many_maps_are_taken_in_parts(monkeypatch):
    maps = related_maps(2, 7, 9, 10)
    whole = evaluate(*maps, backend="analytic")
    monkeypatch.setitem(analytic.CHUNKS, "cpu", 3 * 90 // torch.get_num_threads())
    parts = evaluate(*maps, backend="analytic")
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


def test_threads_change_nothing(backend):
    maps, options = related_maps(2, 5, 30, 40), dict(backend=backend, sizes=[(30, 40), (21, 32)])
    expected, threads = evaluate(*maps, **options), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared = evaluate(*maps, **options)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(shared, expected, rtol=1e-6, atol=1e-9)
    results = []
    workers = [
        threading.Thread(target=lambda: results.append(evaluate(*maps, **options)))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 3 and all(all(map(torch.equal, r, expected)) for r in results)


# --- what autograd asks for ---


def test_without_gradient_only_the_value_is_made(backend, monkeypatch):
    student, teacher = related_maps(2, 3, 9, 10)
    expected, _ = evaluate(student, teacher, backend=backend)
    module, asked = loss.FAST[backend], []

    def kernel(x, y, affine, options, gradient, factor, known=module.kernel):
        asked.append(gradient)
        return known(x, y, affine, options, gradient, factor)

    monkeypatch.setattr(module, "kernel", kernel)
    value = ssim_loss(student, teacher, normalize="minmax", backend=backend)
    with torch.no_grad():
        same = ssim_loss(
            student.clone().requires_grad_(), teacher, normalize="minmax", backend=backend
        )
    assert asked == [None, None] and not value.requires_grad
    torch.testing.assert_close(value, expected)
    assert torch.equal(value, same)


def test_gradient_is_scaled_by_what_comes_from_above(backend):
    student, teacher = related_maps(1, 2, 9, 10)
    _, gradient = evaluate(student, teacher, backend=backend)
    student.requires_grad_()
    value = -3 * ssim_loss(student, teacher, normalize="minmax", backend=backend)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], -3 * gradient)


def test_a_retained_graph_gives_the_gradient_again(backend):
    student, teacher = related_maps(1, 2, 9, 10)
    value = ssim_loss(student.requires_grad_(), teacher, normalize="minmax", backend=backend)
    (first,) = torch.autograd.grad(value, student, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * value, student)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first, rtol=1e-4, atol=1e-8)


def test_second_derivatives_are_the_definitions(backend):
    student, teacher = related_maps(1, 2, 6, 7)

    def second(student, teacher, backend):
        student = student.detach().requires_grad_()
        value = ssim_loss(student, teacher, window_size=3, backend=backend)
        (first,) = torch.autograd.grad(value, student, create_graph=True)
        return torch.autograd.grad(first.square().sum(), student)[0]

    expected = second(student.double(), teacher.double(), "definition")
    assert expected.abs().max() > 0
    deviation = (second(student, teacher, backend) - expected).abs().max()
    assert deviation < 1e-3 * expected.abs().max()


def test_the_teacher_is_a_constant_even_if_it_has_a_graph(backend):
    student, teacher = related_maps(1, 2, 9, 10)
    source = teacher.requires_grad_()
    made = source.square()
    for _ in range(2):  # a graph would be gone after the first backward
        evaluate(student, made, backend=backend)
    value = ssim_loss(student.requires_grad_(), source, normalize="minmax", backend=backend)
    value.backward()
    assert source.grad is None


def test_the_teachers_maps_are_not_kept(backend):
    student, teacher = related_maps(1, 2, 6, 7)
    value = ssim_loss(student.requires_grad_(), teacher, normalize="minmax", backend=backend)
    data = teacher.untyped_storage()._weak_ref()
    del teacher
    gc.collect()
    assert torch.UntypedStorage._expired(data)
    with pytest.raises(RuntimeError, match="needs the teacher's maps"):
        torch.autograd.grad(value, student, create_graph=True)


class Made(TorchDispatchMode):
    """Knows the memory that was taken while it was on, and whether it is still held."""

    def __init__(self, *given):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.given:
                    self.storages[storage._weak_ref()] = storage.nbytes()
        return result

    def held(self):
        gc.collect()
        expired = torch.UntypedStorage._expired
        return sum(size for ref, size in self.storages.items() if not expired(ref))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [None, [(40, 60), (33, 51)]], ids=["whole", "padded"])
def test_no_more_than_the_students_maps_and_their_gradient_are_kept(backend, sizes, dtype):
    student, teacher = related_maps(2, 8, 40, 60, dtype=dtype)
    student.requires_grad_()
    options = dict(normalize="minmax", sizes=sizes, backend=backend)
    with torch.no_grad():
        ssim_loss(student, teacher, **options)  # makes the windows
    with Made(student, teacher) as made:
        value = ssim_loss(student, teacher, **options)
    one_set = 4 * student.numel()  # in float32
    kept = student.numel() * student.element_size() + made.held()
    assert one_set <= made.held() and kept < (2.4 if dtype == torch.float32 else 1.9) * one_set
    value.backward()


# --- which backend ---


def chosen(student, teacher, **options):
    """The backend that "auto" takes."""
    options = {"border": "renormalize", "exponents": (1, 1, 1), "window_size": 11, **options}
    return loss._choose("auto", student, teacher, options.pop("normalize", "minmax"), options)


@pytest.mark.parametrize(
    "options",
    [{"border": "zero"}, {"exponents": (0, 1, 1)}, {"normalize": "standardize"}],
    ids=str,
)
def test_unsupported_options_use_the_definition(options, backend):
    student, teacher = related_maps(2, 3, 14, 22)
    assert chosen(student, teacher, **options) == "definition"
    found = evaluate(student, teacher, **options)
    assert all(map(torch.equal, found, evaluate(student, teacher, backend="definition", **options)))
    with pytest.raises(ValueError, match=f"backend '{backend}' does not compute.*'auto'"):
        evaluate(student, teacher, backend=backend, **options)


def test_auto_takes_the_fastest(monkeypatch):
    maps = related_maps(1, 2, 6, 7)
    assert chosen(*maps) == ("analytic" if compiled.library() is None else "cpp")
    assert chosen(*(m.double() for m in maps)) == "definition"
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert chosen(*maps) == "analytic"


def test_an_unknown_backend_raises():
    maps = related_maps(1, 2, 6, 7)
    with pytest.raises(ValueError, match="backend must be one of auto, definition, .* got 'fast'"):
        ssim_loss(*maps, backend="fast")
    with pytest.raises(ValueError, match="backend 'triton' does not compute .* on cpu"):
        ssim_loss(*maps, backend="triton")


@pytest.mark.parametrize("sizes", [[(6, 7)], [(6, 7), (0, 3)], [(6, 7), (6, 8)]], ids=str)
def test_sizes_that_do_not_fit_raise(sizes):
    with pytest.raises(
        ValueError, match="sizes must be .* within 6 x 7 cells, of each of 2 images"
    ):
        ssim_loss(*related_maps(2, 2, 6, 7), sizes=sizes)


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("no-such-compiler", "FileNotFoundError"),
        ("false", "exit status 1"),
        ("true", "OSError"),
        ("c++ '", "No closing quotation"),
        (r"""sh -c 'printf "\351chec" >&2; exit 1'""", "\ufffdchec"),  # Latin-1
    ],
)
def test_without_a_working_compiler_one_warning_and_the_same_loss(
    monkeypatch, caplog, compiler, reason
):
    maps = related_maps(2, 5, 9, 10)
    expected = evaluate(*maps, backend="analytic")
    monkeypatch.setenv("CXX", compiler)
    compiled.library.cache_clear()
    try:
        results = [evaluate(*maps) for _ in range(2)]
    finally:
        compiled.library.cache_clear()
    assert all(map(torch.equal, results[0] + results[1], expected + expected))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert compiler in record.getMessage() and reason in record.getMessage()
