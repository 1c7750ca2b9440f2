import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import image_batch
from detectron2.config import CfgNode, get_cfg
from ssimkd import ConfigError, add_ssimkd_config
from ssimkd.losses import (
    KD_LOSS_REGISTRY,
    Context,
    CWDLoss,
    DeFeatLoss,
    FGDLoss,
    FKDLoss,
    L1Loss,
    L2Loss,
    MGDLoss,
    MSSSIMLoss,
    PKDLoss,
    SSIMLoss,
    build_loss,
)
from ssimkd.ssim.definition import ssim_loss
from ssimkd.ssim.normalize import NORMALIZATIONS, SCOPES, normalize_maps

NORMALIZING = {"ssim": SSIMLoss, "l1": L1Loss, "l2": L2Loss, "ms_ssim": MSSSIMLoss}
LOSSES = {**NORMALIZING, "pkd": PKDLoss, "cwd": CWDLoss, "defeat": DeFeatLoss}
# Losses and settings that give each image the same share of a batch, whatever the others are
BY_IMAGE = [
    *[
        (loss_class, {"normalize": kind, "normalize_scope": scope})
        for loss_class in NORMALIZING.values()
        for kind in NORMALIZATIONS
        for scope in ("channel", "image")
    ],
    (CWDLoss, {}),
]
# The others: one statistic or mean over the cells of all images
BY_BATCH = [
    *[
        (loss_class, {"normalize": kind, "normalize_scope": "batch"})
        for loss_class in NORMALIZING.values()
        for kind in NORMALIZATIONS
    ],
    (PKDLoss, {}),
    (DeFeatLoss, {}),
]
TRAINED = {"fkd": FKDLoss, "fgd": FGDLoss, "mgd": MGDLoss}  # with trainable parts
STRIDES = {"p3": 8, "p5": 32}
SIZES = [(64, 96), (40, 80), (64, 96), (33, 17)]  # pixels; padded to 64 x 96, a multiple of 32
REGISTERED = sorted(name for name, _ in KD_LOSS_REGISTRY)

every_loss = pytest.mark.parametrize("loss_class", LOSSES.values(), ids=LOSSES)
COMMON = [name for name in REGISTERED if name != "icd"]  # it draws: tests/test_icd.py
every_name = pytest.mark.parametrize("name", REGISTERED)
common_name = pytest.mark.parametrize("name", COMMON)
every_kind = pytest.mark.parametrize("normalize", NORMALIZATIONS)
every_scope = pytest.mark.parametrize("scope", SCOPES)


def settings(pairs):
    """Parametrises a test with classes of losses and the options that they take."""
    names = ["-".join([loss_class.name, *options.values()]) for loss_class, options in pairs]
    return pytest.mark.parametrize(("loss_class", "options"), pairs, ids=names)


def levels(n, height, width, channels=3, seed=0):
    """Maps of n images of height x width pixels, each image of another scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1.0, n + 1).view(n, 1, 1, 1)
    return {
        level: scale
        * torch.randn(
            n, channels, height // s, width // s, generator=generator, dtype=torch.float64
        )
        for level, s in STRIDES.items()
    }


def padded_batch():
    """Student and teacher maps, and the context, of the images of SIZES in one batch."""
    return levels(4, 64, 96), levels(4, 64, 96, seed=1), context_of(SIZES)


def equal_batch():
    """Two images that fill their maps."""
    student, teacher = levels(2, 64, 96), levels(2, 64, 96, seed=1)
    return student, teacher, context_of([(64, 96)] * 2)


def context_of(sizes, **options):
    """Images of `sizes` pixels, one object in each."""
    return Context(sizes, STRIDES, [x["instances"] for x in image_batch(*sizes)], **options)


def make_loss(name, **options):
    """A loss for maps of three channels, its trainable parts away from where they start."""
    if name == "mgd":
        options["mask_ratio"] = 0.0  # nothing is drawn: calls compare
    loss = KD_LOSS_REGISTRY.get(name)(**options)
    torch.manual_seed(0)
    loss.attach(dict.fromkeys(STRIDES, 3), num_classes=4)
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter)
    return loss.double()


def distill_node(*overrides):
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    cfg.merge_from_list(list(overrides))
    return cfg.MODEL.DISTILL


# --- values ---


@settings(BY_IMAGE + BY_BATCH)
def test_equal_maps_cost_nothing(loss_class, options):
    _, teacher, context = padded_batch()
    student = {level: x.clone().requires_grad_() for level, x in teacher.items()}
    losses = loss_class(**options)(student, teacher, context)
    gradients = torch.autograd.grad(sum(losses.values()), list(student.values()))
    assert list(losses) == ["p3", "p5"]
    for value in [*losses.values(), *gradients]:
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("loss_class", "known"), [(L1Loss, F.l1_loss), (L2Loss, F.mse_loss)])
def test_raw_features_reduce_to_torch_losses(loss_class, known):
    student, teacher, context = equal_batch()
    losses = loss_class(normalize="none")(student, teacher, context)
    for level, value in losses.items():
        torch.testing.assert_close(value, known(student[level], teacher[level]))


@every_scope
@every_kind
@pytest.mark.parametrize(
    ("loss_class", "known"), [(L1Loss, F.l1_loss), (L2Loss, F.mse_loss), (SSIMLoss, ssim_loss)]
)
def test_whole_images_reduce_to_the_loss_of_normalised_maps(loss_class, known, normalize, scope):
    student, teacher, context = equal_batch()
    losses = loss_class(normalize=normalize, normalize_scope=scope)(student, teacher, context)
    options = {"data_range": NORMALIZATIONS[normalize]} if known is ssim_loss else {}
    for level, value in losses.items():
        maps = normalize_maps(student[level], teacher[level], normalize, scope, None)
        torch.testing.assert_close(value, known(*maps, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"border": "reflect"},
        {"window_size": 3},
        {"sigma": 0.7},
        {"k1": 0.5},
        {"k2": 0.5},
        {"exponents": [0.0, 1.0, 2.0]},
    ],
    ids=str,
)
def test_ssim_options_reach_the_similarity(options):
    student, teacher, context = equal_batch()
    value = SSIMLoss(normalize="none", **options)(student, teacher, context)["p3"]
    torch.testing.assert_close(value, ssim_loss(student["p3"], teacher["p3"], **options))
    plain = SSIMLoss(normalize="none")(student, teacher, context)["p3"]
    assert abs(value - plain) > 1e-6


@common_name
def test_the_weight_is_left_to_the_caller(name):
    batch, heavy, light = equal_batch(), make_loss(name, weight=7), make_loss(name, weight=0)
    assert heavy.weight == 7.0
    torch.testing.assert_close(heavy(*batch), light(*batch))


# DeFeat is a mean over levels that share the objects out
@pytest.mark.parametrize("name", [name for name in COMMON if name != "defeat"])
def test_levels_are_independent(name):
    student, teacher, context = padded_batch()
    loss = make_loss(name)
    losses = loss(student, teacher, context)
    assert list(losses) == list(student)
    for level, value in losses.items():
        alone = loss({level: student[level]}, {level: teacher[level]}, context)
        torch.testing.assert_close(alone, {level: value})


# --- batches of images that differ in size ---


def mean_over_images(loss, student, teacher):
    """Mean of the loss over the images of SIZES, each cut out and on its own."""
    values = []
    for image, (height, width) in enumerate(SIZES):
        alone = []
        for maps in (student, teacher):
            crops = {}
            for level, stride in STRIDES.items():
                h, w = math.ceil(height / stride), math.ceil(width / stride)
                crops[level] = maps[level][image : image + 1, :, :h, :w]
            alone.append(crops)
        values.append(loss(*alone, context_of([(height, width)])))
    return {level: torch.stack([v[level] for v in values]).mean() for level in STRIDES}


@settings(BY_IMAGE)
def test_a_batch_is_the_mean_of_its_images(loss_class, options):
    student, teacher, context = padded_batch()
    loss = loss_class(**options)
    expected = mean_over_images(loss, student, teacher)
    torch.testing.assert_close(loss(student, teacher, context), expected)


@pytest.mark.parametrize("name", ["fgd", "mgd"])  # fkd's images share one square root
def test_a_batch_is_the_mean_of_its_images_for_trained_losses(name):
    student, teacher, context = padded_batch()
    loss = make_loss(name)
    expected = mean_over_images(loss, student, teacher)
    torch.testing.assert_close(loss(student, teacher, context), expected)


@pytest.mark.parametrize("border", ["renormalize", "reflect", "valid", "zero"])
def test_a_batch_is_the_mean_of_its_images_for_every_border(border):
    student, teacher, context = padded_batch()
    loss = SSIMLoss(border=border, exponents=(1, 0.5, 2))
    expected = mean_over_images(loss, student, teacher)
    torch.testing.assert_close(loss(student, teacher, context), expected)


@settings(BY_IMAGE + BY_BATCH)
def test_padded_cells_matter_only_without_the_mask(loss_class, options):
    check_padded_cells(loss_class(**options))


@pytest.mark.parametrize("name", TRAINED)
def test_padded_cells_matter_only_without_the_mask_for_trained_losses(name):
    check_padded_cells(make_loss(name))


def check_padded_cells(loss):
    student, teacher, context = padded_batch()
    other = {}
    for level, x in student.items():
        inside = context.inside(level, x)
        other[level] = torch.where(inside, x, 5 * x + 100).requires_grad_()
    masked = loss(other, teacher, context)
    torch.testing.assert_close(masked, loss(student, teacher, context), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(sum(masked.values()), list(other.values()))
    for (level, x), gradient in zip(other.items(), gradients):
        outside = ~context.inside(level, x).expand_as(x)
        assert gradient[outside].abs().max() == 0
    context.mask_padding = False
    unmasked = loss(other, teacher, context), loss(student, teacher, context)
    for level in STRIDES:
        assert abs(unmasked[0][level] - unmasked[1][level]) > 1e-6


@common_name
def test_without_the_mask_padding_counts_as_image(name):
    student, teacher, context = padded_batch()
    context.mask_padding = False
    loss = make_loss(name)
    whole = Context([(64, 96)] * 4, STRIDES, context.targets)
    torch.testing.assert_close(loss(student, teacher, context), loss(student, teacher, whole))


@every_loss
def test_targets_matter_only_to_losses_that_need_them(loss_class):
    student, teacher, context = padded_batch()
    context.targets = None
    if loss_class is DeFeatLoss:
        with pytest.raises(ValueError, match=r"defeat needs ground-truth boxes.*instances"):
            loss_class()(student, teacher, context)
    else:
        expected = loss_class()(*padded_batch())
        torch.testing.assert_close(loss_class()(student, teacher, context), expected)


# --- context ---


def test_cells_are_rounded_up_and_end_with_the_map():
    context = Context([(64, 96), (33, 17), (1, 200)], {"p3": 8, "p6": 64})
    # 33 / 8 = 4.1 -> 5, 17 / 8 = 2.1 -> 3, 1 / 8 -> 1; 200 / 8 = 25, but the map has 12 columns
    assert context.cells("p3", torch.zeros(3, 2, 8, 12)) == [(8, 12), (5, 3), (1, 12)]
    # stride 64: images smaller than one cell cover it; 96 / 64 -> 2
    assert context.cells("p6", torch.zeros(3, 2, 1, 2)) == [(1, 2), (1, 1), (1, 2)]
    context.mask_padding = False
    assert context.cells("p3", torch.zeros(3, 2, 8, 12)) == [(8, 12)] * 3


def test_inside_marks_the_cells_of_each_image():
    inside = Context([(17, 40), (24, 9)], {"p3": 8}).inside("p3", torch.zeros(2, 7, 4, 5))
    expected = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    expected[0, 0, :3, :5] = True  # 17 / 8 -> 3, 40 / 8 = 5
    expected[1, 0, :3, :2] = True  # 24 / 8 = 3, 9 / 8 -> 2
    assert torch.equal(inside, expected)


@pytest.mark.parametrize(
    ("image_sizes", "stride", "map_size"),
    [
        ([(32, 40), (32, 40)], 8, (4, 5)),
        ([(31, 33), (25, 40)], 8, (4, 5)),  # both round up to 4 x 5 cells
        ([(20, 30), (64, 5)], 64, (1, 1)),
        ([(100, 100)], 8, (4, 5)),
    ],
)
def test_inside_is_none_where_images_fill_the_map(image_sizes, stride, map_size):
    maps = torch.zeros(len(image_sizes), 2, *map_size)
    assert Context(image_sizes, {"p": stride}).inside("p", maps) is None


def test_inside_is_none_without_the_mask():
    context = Context([(8, 8), (32, 40)], {"p3": 8}, mask_padding=False)
    assert context.inside("p3", torch.zeros(2, 3, 4, 5)) is None


def test_crops_group_images_of_equal_cells():
    context = Context([(32, 40), (17, 9), (32, 40), (24, 16)], {"p3": 8})
    student = torch.arange(4.0 * 2 * 4 * 5).view(4, 2, 4, 5)
    teacher = -student
    groups = list(context.crops("p3", student, teacher))
    assert [share for _, share in groups] == [0.5, 0.5]
    # 17 x 9 and 24 x 16 pixels are 3 x 2 cells both
    for (maps, _), images, (h, w) in zip(groups, ([0, 2], [1, 3]), ((4, 5), (3, 2))):
        assert torch.equal(maps[0], student[images, :, :h, :w])
        assert torch.equal(maps[1], teacher[images, :, :h, :w])


def test_crops_of_equal_images_are_the_maps_themselves():
    maps = torch.zeros(3, 2, 4, 5)
    ((cropped, share),) = Context([(30, 40)] * 3, {"p3": 8}).crops("p3", maps)
    assert share == 1.0
    assert cropped[0].shape == maps.shape and cropped[0].data_ptr() == maps.data_ptr()


# --- registry and settings ---


def test_the_registry_knows_the_losses_by_name():
    for name, loss_class in {**LOSSES, **TRAINED}.items():
        assert KD_LOSS_REGISTRY.get(name) is loss_class
        assert loss_class.name == name


@every_name
def test_defaults_of_class_and_config_are_the_same(name):
    parameters = inspect.signature(KD_LOSS_REGISTRY.get(name)).parameters
    node = distill_node()[name.upper()]
    assert {k: p.default for k, p in parameters.items()} == {k.lower(): v for k, v in node.items()}


@every_name
def test_build_loss_takes_its_node(name):
    loss = build_loss(name, distill_node(f"MODEL.DISTILL.{name.upper()}.WEIGHT", 0.25))
    assert type(loss) is KD_LOSS_REGISTRY.get(name)
    assert loss.weight == 0.25


def test_build_loss_passes_every_setting_on():
    settings = {
        "NORMALIZE": "standardize",
        "NORMALIZE_SCOPE": "image",
        "BORDER": "zero",
        "WINDOW_SIZE": 5,
        "SIGMA": 2.0,
        "K1": 0.1,
        "K2": 0.2,
        "EXPONENTS": (0.0, 1.0, 0.5),
    }
    overrides = [x for k, v in settings.items() for x in (f"MODEL.DISTILL.SSIM.{k}", v)]
    student, teacher, context = padded_batch()
    built = build_loss("ssim", distill_node(*overrides))(student, teacher, context)
    expected = SSIMLoss(**{k.lower(): v for k, v in settings.items()})(student, teacher, context)
    torch.testing.assert_close(built, expected)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("sim", [], r"MODEL\.DISTILL\.LOSSES: .*'sim'.*l1, l2.*ssim"),
        ("SSIM", [], r"MODEL\.DISTILL\.LOSSES: .*'SSIM'"),
        ("ssim", ["SSIM.BORDER", "replicate"], r"MODEL\.DISTILL\.SSIM: border .*'replicate'"),
        ("ssim", ["SSIM.WEIGHT", -1.0], r"MODEL\.DISTILL\.SSIM: weight .*-1\.0"),
        ("ssim", ["SSIM.WEIGHT", math.nan], r"MODEL\.DISTILL\.SSIM: weight .*nan"),
        ("ssim", ["SSIM.WINDOW_SIZE", 8], r"MODEL\.DISTILL\.SSIM: window_size .*8"),
        ("ssim", ["SSIM.SIGMA", 0.0], r"MODEL\.DISTILL\.SSIM: sigma .*0\.0"),
        ("ssim", ["SSIM.EXPONENTS", (1, 1)], r"MODEL\.DISTILL\.SSIM: exponents .*\(1, 1\)"),
        ("ssim", ["SSIM.NORMALIZE", "max"], r"MODEL\.DISTILL\.SSIM: normalize .*'max'"),
        ("l1", ["L1.NORMALIZE", "max"], r"MODEL\.DISTILL\.L1: normalize .*'max'"),
        ("l1", ["L1.WEIGHT", math.inf], r"MODEL\.DISTILL\.L1: weight .*inf"),
        ("l2", ["L2.NORMALIZE_SCOPE", "level"], r"MODEL\.DISTILL\.L2: normalize_scope .*'level'"),
        ("l2", ["L2.WEIGHT", -0.5], r"MODEL\.DISTILL\.L2: weight .*-0\.5"),
        ("cwd", ["CWD.TAU", 0.0], r"MODEL\.DISTILL\.CWD: tau .*0\.0"),
        ("defeat", ["DEFEAT.BACKGROUND_WEIGHT", -1.0], r"DEFEAT: background_weight .*-1\.0"),
        ("ms_ssim", ["MS_SSIM.SCALE_EXPONENTS", ()], r"MS_SSIM: scale_exponents .*\(\)"),
        ("ms_ssim", ["MS_SSIM.BORDER", "wrap"], r"MODEL\.DISTILL\.MS_SSIM: border .*'wrap'"),
        ("pkd", ["PKD.WEIGHT", math.nan], r"MODEL\.DISTILL\.PKD: weight .*nan"),
        ("fkd", ["FKD.TEMPERATURE", 0.0], r"MODEL\.DISTILL\.FKD: temperature .*0\.0"),
        ("fkd", ["FKD.POOL_SIZES", (8, 0)], r"MODEL\.DISTILL\.FKD: pool_sizes .*\(8, 0\)"),
        ("fgd", ["FGD.RELATION", math.inf], r"MODEL\.DISTILL\.FGD: relation .*inf"),
        ("mgd", ["MGD.MASK_RATIO", 1.0], r"MODEL\.DISTILL\.MGD: mask_ratio .*1\.0"),
    ],
)
def test_build_loss_names_the_key_to_change(name, overrides, message):
    keys = [f"MODEL.DISTILL.{x}" if i % 2 == 0 else x for i, x in enumerate(overrides)]
    with pytest.raises(ConfigError, match=message):
        build_loss(name, distill_node(*keys))


def test_build_loss_names_missing_and_superfluous_settings():
    node = distill_node()
    node.L1.BORDER = "zero"
    with pytest.raises(ConfigError, match=r"MODEL\.DISTILL\.L1: .*border"):
        build_loss("l1", node)
    with pytest.raises(ConfigError, match=r"MODEL\.DISTILL\.L2 is missing"):
        build_loss("l2", CfgNode({"L1": {"WEIGHT": 1.0}}))
