"""What a loss asks of the host on a GPU: no wait, and only the copies that its formula needs.

The tensors are PyTorch's fakes: they have a GPU for their device and no values. So an operator that
has to read a value (an item, a mask's number of elements) raises, as it would wait on a GPU.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes
from loss_cases import SIZES, batch_for, changed, make_loss
from ssimkd.losses import KD_LOSS_REGISTRY
from ssimkd.ssim import analytic, gpu
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# With torch 2.6 a fake of a GPU's tensor aborts the process where there is no GPU
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14), reason="not tried before 2.14"
)
NAMES = sorted(name for name, _ in KD_LOSS_REGISTRY)
BOXES = "the boxes of each image's ground truth"
COPIES = {  # number, and what is copied to the GPU
    "fgd": (len(SIZES), BOXES),
    "defeat": (len(SIZES), BOXES),
    "icd": (4 * len(SIZES), "an image's queries, drawn on the CPU: boxes, centres, classes, size"),
}
# Detectron2's Matcher asserts that overlaps are >= 0; before, ground truth is copied for it
WAITS = {"dkd": "modeling/matcher.py"}


class Copies(TorchDispatchMode):
    """Counts the copies between devices."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
        if "copy" in str(function):
            self.found += len({x.device.type for x in tensors if x.dim()}) > 1
        return result


def on_gpu(x):
    """A fake like x, on a GPU."""
    like = dict(dtype=torch.float32, device="cuda", requires_grad=x.requires_grad)
    return torch.empty_strided(x.shape, x.stride(), **like)


def fakes(name, mode, **options):
    """A loss, its parameters included, and its arguments; ground truth stays on the host."""
    loss, (student, teacher, context) = make_loss(name, **options), batch_for(name)
    with mode:
        for module in loss.modules():
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, torch.nn.Parameter(on_gpu(parameter), requires_grad=False))
        for side in (student, teacher):
            for stage in side.get("roi", ()):
                stage.proposals = [Boxes(on_gpu(x.tensor)) for x in stage.proposals]
        return loss, (changed(student, on_gpu), changed(teacher, on_gpu), context)


def forward(mode, loss, given):
    """The number of copies between devices. (autograd's engine would ask for a real GPU.)"""
    with mode, Copies() as copies:
        loss(*given)
    return copies.found


@pytest.fixture
def mode(monkeypatch):
    """In this mode everything is done with fakes."""
    # a window's matrices are made once per size on the host; a GPU has them in one block
    whole = lambda matrix, length: [(*(slice(0, n) for n in matrix.shape), matrix)]  # noqa: E731
    monkeypatch.setattr(analytic, "_blocks", whole)
    caches = analytic._windows, analytic.window_matrices
    for cached in caches:
        cached.cache_clear()
    yield FakeTensorMode(allow_non_fake_inputs=True)
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WAITS])
def test_no_loss_waits_for_a_gpu_and_few_copy_to_it(name, mode, monkeypatch):
    options = {"backend": "analytic"} if name == "ssim" else {}
    loss, given = fakes(name, mode, **options)
    if name == "icd":  # the host draws them
        queries = loss.draw_queries(given[2].targets[0], SIZES[0])
        monkeypatch.setattr(loss, "draw_queries", lambda target, size: queries)
    if name == "ssim":
        forward(mode, loss, given)  # makes the windows' matrices
    assert forward(mode, loss, given) == COPIES.get(name, (0, ""))[0]


@pytest.mark.parametrize("name", WAITS)
def test_detectron2_itself_waits_in_some(name, mode):
    with pytest.raises(DataDependentOutputException) as error:
        forward(mode, *fakes(name, mode))
    assert any(WAITS[name] in str(entry.path) for entry in error.traceback)


@pytest.mark.skipif(gpu.triton is None, reason="there is no Triton here")
def test_the_kernels_of_ssim_are_launched_without_a_wait(mode, monkeypatch):
    launched = []

    class Launcher:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append(grid)

    kernels = SimpleNamespace(forward_kernel=Launcher(), backward_kernel=Launcher())
    monkeypatch.setattr(gpu, "triton_kernels", kernels)
    monkeypatch.setattr(gpu, "passes_self_test", lambda *kind: True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    weights = gpu.gaussian_weights(dict(window_size=11, sigma=1.5))
    monkeypatch.setattr(gpu, "gaussian_weights", lambda options: weights)
    assert forward(mode, *fakes("ssim", mode, backend="triton")) == 0
    assert len(launched) == 2 * 2 * len(SIZES)  # forward and backward, of two levels


def test_the_counter_sees_copies_and_fakes_refuse_waits(mode):
    with mode, Copies() as copies:
        x = on_gpu(torch.zeros(4))
        torch.zeros(4).to(x)
        torch.tensor([1, 2], device="cuda")
        x.double()
        for wait in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x[x > 0]):
            with pytest.raises(RuntimeError):
                wait()
    assert copies.found == 2
