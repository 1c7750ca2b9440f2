"""Where a teacher comes from, which weights it must have, and how it prepares images."""

import pickle

import pytest
import torch
from conftest import image_batch, narrow_opts, shapes_cfg
from detectron2.modeling import build_model
from ssimkd import ConfigError
from ssimkd.teacher.frozen import Teacher
from ssimkd.teacher.preprocessing import Preprocessing
from ssimkd.teacher.spec import TeacherSpec
from ssimkd.utils.compat import model_zoo

CONFIG = "configs/shapes/teacher.yaml"
CPU = torch.device("cpu")
KEY = "MODEL.DISTILL.TEACHER"
BATCH = image_batch((96, 96), (96, 112))


@pytest.fixture
def state(teacher_file):
    return torch.load(teacher_file)["model"]


def save(path, state):
    torch.save({"model": state}, path)
    return str(path)


NOTHING = torch.zeros(0)  # for a student whose images are of no use to the teacher


def maps_of(teacher, batch=BATCH, input_format="BGR"):
    return teacher(batch, NOTHING, Preprocessing(input_format))[0]


def test_it_is_the_detectors_own_backbone(teacher_file, state):
    detector = build_model(shapes_cfg("teacher"))
    detector.load_state_dict(state)
    expected = detector.eval().backbone(detector.preprocess_image(BATCH).tensor)
    teacher = Teacher(TeacherSpec(CONFIG, teacher_file), CPU)
    assert [name for name, _ in teacher.model.named_children()] == ["backbone"]  # no heads
    found, padded = teacher(BATCH, NOTHING, Preprocessing("BGR"))
    assert padded == (96, 128)
    for level, value in expected.items():
        value = value.detach()  # equal but for rounding: its batch norms are folded
        torch.testing.assert_close(found[level], value, rtol=0, atol=1e-5 * float(value.max()))
        assert found[level].is_contiguous() and not found[level].requires_grad


def test_a_teacher_is_named_as_in_the_zoo_or_as_this_projects_configs():
    spec = TeacherSpec("COCO-Detection/retinanet_R_50_FPN_1x")
    assert spec.load_config().MODEL.META_ARCHITECTURE == "RetinaNet"
    assert spec._zoo_weights() == model_zoo.get_checkpoint_url(f"{spec.config}.yaml")
    assert TeacherSpec("shapes/teacher").load_config() == TeacherSpec(CONFIG).load_config()


@pytest.mark.parametrize(
    "spec, message",
    [
        (TeacherSpec(""), f"{KEY}.CONFIG is empty"),
        (TeacherSpec("COCO-Detection/no_such"), f"{KEY}.CONFIG: .*/no_such' is neither"),
        (TeacherSpec(CONFIG), f"{KEY}.WEIGHTS is empty and .* {CONFIG}"),
        (TeacherSpec(CONFIG, "no/such.pth"), f"{KEY}.WEIGHTS: there is no file no/such.pth"),
        (TeacherSpec(CONFIG, "x.pth", ["NO.KEY", 1]), f"{KEY}.CONFIG or .OPTS: .*NO.KEY"),
        (TeacherSpec(CONFIG, CONFIG), f"{KEY}.WEIGHTS: {CONFIG} cannot be read: it is no"),
    ],
)
def test_what_cannot_be_found_is_named(spec, message):
    with pytest.raises(ConfigError, match=message) as error:
        Teacher(spec, CPU)
    assert len(str(error.value).splitlines()) == 1


NAME = "backbone.fpn_output3.weight"
MEAN = "backbone.bottom_up.stem.conv1.norm.running_mean"


@pytest.mark.parametrize(
    "name, value, message",
    [
        (NAME, None, f"{KEY}.WEIGHTS: .*{NAME} is missing"),
        (MEAN, None, f"{MEAN} is missing"),
        (NAME, torch.zeros(3, 3), rf"{NAME} is \(3, 3\) instead of \(64, 64, 3, 3\)"),
        (NAME, torch.full((64, 64, 3, 3), float("nan")), f"NaN or infinity in {NAME}"),
    ],
)
def test_a_backbone_that_is_not_whole_stops_the_run(tmp_path, state, name, value, message):
    del state[name]
    if value is not None:
        state[name] = value
    with pytest.raises(ConfigError, match=message):
        Teacher(TeacherSpec(CONFIG, save(tmp_path / "t.pth", state)), CPU)


def test_the_heads_may_be_missing(tmp_path, state):
    backbone = {k: v for k, v in state.items() if k.startswith("backbone.")}
    Teacher(TeacherSpec(CONFIG, save(tmp_path / "t.pth", backbone)), CPU)


@pytest.mark.parametrize("weights", ["", "detectron2://COCO-Detection/x/model.pkl"])
def test_zoo_urls_are_read_from_detectron2s_cache(weights, monkeypatch, tmp_path, teacher_file):
    """No network here: the file is put where a download would have put it."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    url = "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/x/model.pkl"
    monkeypatch.setattr(model_zoo, "get_checkpoint_url", lambda name: url)
    state = {k: v.numpy() for k, v in torch.load(teacher_file)["model"].items()}
    path = tmp_path / "detectron2/COCO-Detection/x/model.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))
    found = maps_of(Teacher(TeacherSpec(CONFIG, weights), CPU))
    expected = maps_of(Teacher(TeacherSpec(CONFIG, teacher_file), CPU))
    assert all(torch.equal(found[level], expected[level]) for level in expected)


def test_its_own_mean_deviation_and_channel_order(tmp_path, state, teacher_file):
    """A teacher for RGB in [0, 1] whose first layer undoes that sees what its twin sees."""
    # stem: conv(x_bgr - mean) / 1 against conv'((x_rgb - 255 mean') / (255 std'))
    mean, std = [0.1, 0.4, 0.2], [0.5, 0.25, 0.125]
    rgb = dict(state)
    stem = "backbone.bottom_up.stem.conv1.weight"
    rgb[stem] = state[stem].flip(1) * (torch.tensor(std) * 255).view(1, 3, 1, 1)
    bgr_opts = ["MODEL.PIXEL_MEAN", [51.0, 102.0, 25.5]]
    rgb_opts = [
        "INPUT.FORMAT", "RGB",
        "MODEL.PIXEL_MEAN", [255 * m for m in mean],
        "MODEL.PIXEL_STD", [255 * s for s in std],
    ]  # fmt: skip
    expected = maps_of(Teacher(TeacherSpec(CONFIG, teacher_file, bgr_opts), CPU))
    twin = Teacher(TeacherSpec(CONFIG, save(tmp_path / "rgb.pth", rgb), rgb_opts), CPU)
    for level, value in maps_of(twin).items():
        torch.testing.assert_close(value, expected[level], rtol=1e-3, atol=1e-3)
    flipped = [{"image": x["image"].flip(0)} for x in BATCH]  # an RGB student's images
    for level, value in maps_of(twin, flipped, "RGB").items():
        torch.testing.assert_close(value, expected[level], rtol=1e-3, atol=1e-3)


def test_only_equal_formats_or_bgr_and_rgb_can_be_used_together(teacher_file):
    opts = ["MODEL.PIXEL_MEAN", [51.0, 102.0, 25.5]]  # one for each channel: the order matters
    expected = maps_of(Teacher(TeacherSpec(CONFIG, teacher_file, opts), CPU))
    teacher = Teacher(TeacherSpec(CONFIG, teacher_file, [*opts, "INPUT.FORMAT", "HSV"]), CPU)
    found = maps_of(teacher, input_format="HSV")
    assert all(torch.equal(found[level], expected[level]) for level in expected)
    message = f"^INPUT.FORMAT .* is 'BGR' and the teacher's, by {KEY}.OPTS, 'HSV'"
    with pytest.raises(ConfigError, match=message):
        maps_of(teacher, input_format="BGR")


def test_a_teacher_that_cannot_be_built_is_named(teacher_file):
    opts = ["MODEL.META_ARCHITECTURE", "NoSuchNet"]
    with pytest.raises(ConfigError, match=f"{KEY}.CONFIG: cannot build .*NoSuchNet"):
        Teacher(TeacherSpec(CONFIG, teacher_file, opts), CPU)


def test_a_teacher_that_names_no_format_is_refused(teacher_file):
    spec = TeacherSpec(CONFIG, teacher_file, ["INPUT.FORMAT", ""])
    with pytest.raises(ConfigError, match=f"^{KEY}.OPTS: the teacher's image format is ''"):
        Teacher(spec, CPU)


def test_a_detector_that_cannot_preprocess_is_refused(tmp_path):
    name = "COCO-Detection/rpn_R_50_FPN_1x.yaml"
    path = save(tmp_path / "t.pth", {})
    with pytest.raises(ConfigError, match="a ProposalNetwork has no preprocess_image"):
        Teacher(TeacherSpec(name, path, narrow_opts(name)), CPU)


def test_a_teacher_takes_its_number_of_classes_from_its_data(teacher_file):
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 7, "DATASETS.NUM_CLASSES_FROM_DATA", True]
    _, cfg, absent = TeacherSpec(CONFIG, teacher_file, opts).load(CPU)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 4 and not absent
