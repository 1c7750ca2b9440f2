"""How a teacher is made faster, and by how much this may change its maps."""

import pytest
import torch
from conftest import image_batch, shapes_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_model
from ssimkd import ConfigError, TorchvisionBackbone
from ssimkd.ssim.definition import ssim_map
from ssimkd.ssim.normalize import normalize_maps
from ssimkd.teacher.frozen import Teacher
from ssimkd.teacher.network import TeacherNetwork, fold_norms, layout_of
from ssimkd.teacher.preprocessing import Preprocessing
from ssimkd.teacher.spec import TeacherSpec

CONFIG = "configs/shapes/teacher.yaml"
WEIGHTS = "configs/shapes/teacher.pth"  # a trained one: precision matters at real values
KEY = "MODEL.DISTILL.TEACHER"
CPU = torch.device("cpu")
BATCH = image_batch((96, 96), (96, 112))


def randomize(norm):
    with torch.no_grad():
        for name, value in norm.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 2) if name == "running_var" else value.normal_()
    return norm


def conv(norm, bias):
    torch.manual_seed(0)
    norm = randomize(get_norm(norm, 32))
    return Conv2d(8, 32, 3, stride=2, groups=2, bias=bias, norm=norm, activation=torch.relu).eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "naiveSyncBN", "GN"])
def test_folding_keeps_the_function(norm, bias):
    layer, x = conv(norm, bias), torch.randn(2, 8, 9, 9)
    expected = layer(x)
    fold_norms(layer)
    assert (layer.norm is None) == (norm != "GN")
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_what_only_looks_like_an_affine_map_is_not_folded():
    class Standardised(Conv2d):  # its forward is its own
        def forward(self, x):
            return self.norm(x)

    own = Standardised(8, 8, 1, norm=FrozenBatchNorm2d(8))
    by_batch = Conv2d(8, 8, 1, norm=torch.nn.BatchNorm2d(8, track_running_stats=False))
    fold_norms(torch.nn.Sequential(own, by_batch))
    assert own.norm is not None and by_batch.norm is not None


@pytest.mark.parametrize(
    "precision, bound",
    [("bfloat16", 2e-3), ("float16", 2e-4)],  # 8 and 11 bits; measured: 3e-4 and 1e-5 at most
)
def test_half_precision_changes_the_structure_little(precision, bound):
    preprocessing = Preprocessing("BGR")
    full, _ = Teacher(TeacherSpec(CONFIG, WEIGHTS), CPU)(BATCH, torch.zeros(0), preprocessing)
    spec = TeacherSpec(CONFIG, WEIGHTS, precision=precision)
    half, _ = Teacher(spec, CPU)(BATCH, torch.zeros(0), preprocessing)
    for level, value in full.items():
        assert half[level].dtype == getattr(torch, precision) and not torch.equal(
            half[level], value
        )
        if min(value.shape[-2:]) > 2:
            pair = normalize_maps(half[level], value, "minmax", "channel", None)
            assert 0 <= 1 - ssim_map(*pair).mean() < bound


def test_by_itself_it_has_the_precision_of_the_students_autocast():
    preprocessing = Preprocessing("BGR")
    teacher = Teacher(TeacherSpec(CONFIG, WEIGHTS), CPU)
    known = {
        precision: Teacher(TeacherSpec(CONFIG, WEIGHTS, precision=precision), CPU)
        for precision in ("float32", "bfloat16")
    }
    inputs = BATCH, torch.zeros(0), preprocessing
    for enabled, precision in ((False, "float32"), (True, "bfloat16"), (False, "float32")):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found, _ = teacher(*inputs)
        expected, _ = known[precision](*inputs)
        for level, value in expected.items():
            assert found[level].dtype == getattr(torch, precision)
            bound = 0.05 * enabled * value.abs().max()  # autocast adds up in another order
            assert (found[level] - value).abs().max() <= bound


def test_a_copy_in_half_precision_is_in_evaluation_mode_too():
    """A copied graph of torchvision is in training mode at first."""
    backbone = TorchvisionBackbone("efficientnet_b0", norm="BN").eval()
    network, images = TeacherNetwork(backbone, "auto", False), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = network(images), network(images)
    assert all(torch.equal(first[level], second[level]) for level in first)
    copied = network.runs[torch.bfloat16, CPU]
    assert not any(module.training for module in copied.modules())


def test_half_precision_has_its_channels_last_and_a_gpus_float32_has_not():
    gpu = torch.device("cuda")
    assert layout_of(torch.float32, gpu) == torch.contiguous_format
    for dtype, device in ((torch.float16, gpu), (torch.bfloat16, CPU), (torch.float32, CPU)):
        assert layout_of(dtype, device) == torch.channels_last
    teacher = Teacher(TeacherSpec(CONFIG, WEIGHTS), CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        teacher(BATCH, torch.zeros(0), Preprocessing("BGR"))
    weight = teacher.network.runs[torch.bfloat16, CPU].fpn_output3.weight
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert teacher.model.backbone.fpn_output3.weight.dtype == torch.float32


def test_an_operator_that_half_precision_lacks_names_the_key(monkeypatch):
    teacher = Teacher(TeacherSpec(CONFIG, WEIGHTS, precision="bfloat16"), CPU)

    def fail(images):
        raise NotImplementedError("\"deformable\" not implemented for 'BFloat16'")

    monkeypatch.setattr(teacher.model.backbone, "forward", fail)
    with pytest.raises(ConfigError, match=f"{KEY}.PRECISION: .* set it to float32: .*BFloat16"):
        teacher(BATCH, torch.zeros(0), Preprocessing("BGR"))


def test_unknown_settings_are_refused():
    with pytest.raises(ConfigError, match=f"{KEY}.PRECISION must be one of auto, float32, bf"):
        build_model(shapes_cfg("ssimkd", f"{KEY}.PRECISION", "half"))


def test_a_compiler_that_is_missing_names_the_key(monkeypatch):
    backbone = build_model(shapes_cfg("teacher")).backbone.eval()

    def fail(*args, **kwargs):
        def run(images):
            raise torch._dynamo.exc.TorchDynamoException("InvalidCxxCompiler: none found")

        return run

    monkeypatch.setattr(torch, "compile", fail)
    network = TeacherNetwork(backbone, "float32", True)
    with pytest.raises(ConfigError, match=f"{KEY}.COMPILE: .* set it to False: .*none found"):
        network(torch.zeros(1, 3, 32, 32))


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_compiled_teacher_is_the_teacher(precision):
    spec = TeacherSpec(CONFIG, WEIGHTS, precision=precision)
    eager, compiled = Teacher(spec, CPU), Teacher(spec, CPU)
    compiled.network = TeacherNetwork(compiled.model.backbone, precision, True)
    bound = 1e-5 if precision == "float32" else 0.05
    for sizes in ([(96, 96)] * 2, [(96, 128)] * 3, [(128, 96)]):
        batch = image_batch(*sizes)
        expected, _ = eager(batch, torch.zeros(0), Preprocessing("BGR"))
        found, _ = compiled(batch, torch.zeros(0), Preprocessing("BGR"))
        for level, value in expected.items():
            assert (found[level] - value).abs().max() < bound * value.abs().max()
