"""When the teacher uses the images that the student has prepared, and when it prepares its own."""

import copy

import pytest
import torch
from conftest import image_batch
from detectron2.modeling import GeneralizedRCNN
from ssimkd.errors import ConfigError
from ssimkd.teacher.frozen import Teacher
from ssimkd.teacher.preprocessing import Preprocessing, image_format_of, preprocessing_of
from ssimkd.teacher.spec import TeacherSpec

CONFIG = "configs/shapes/teacher.yaml"
CPU = torch.device("cpu")
BATCH = image_batch((96, 96), (96, 112))


@pytest.fixture
def pair(student):
    model = student()
    model.distiller.build_teacher(CPU)
    return model, model.distiller.teacher


def test_the_teacher_uses_the_students_images_if_their_preprocessing_is_equal(pair, monkeypatch):
    model, teacher = pair
    images = model.preprocess_image(BATCH).tensor
    own, size = teacher(BATCH, images, Preprocessing("BGR"))  # unknown: it prepares its own
    monkeypatch.setattr(teacher, "preprocess", None)
    shared, shared_size = teacher(BATCH, images, model.preprocessing)
    assert size == shared_size and all(torch.equal(shared[level], x) for level, x in own.items())


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]),
        ("MODEL.PIXEL_STD", [1.0, 2.0, 3.0]),
        ("INPUT.FORMAT", "RGB"),
    ],
)
def test_other_settings_are_another_preprocessing(teacher_file, student, opts):
    teacher = Teacher(TeacherSpec(CONFIG, teacher_file, opts), CPU)
    assert teacher.preprocessing != student().preprocessing


def test_other_code_and_other_padding_are_another_preprocessing(pair, monkeypatch):
    model, teacher = pair
    assert model.preprocessing == teacher.preprocessing == preprocessing_of(model, "BGR")
    with monkeypatch.context() as patch:
        patch.setattr(type(model.backbone), "size_divisibility", 64)
        assert preprocessing_of(model, "BGR") != teacher.preprocessing
    monkeypatch.setattr(type(model), "preprocess_image", lambda self, inputs: None)
    assert preprocessing_of(model, "BGR") != teacher.preprocessing


def test_the_preprocessing_of_a_detector_without_statistics_is_unknown(pair):
    model, teacher = copy.copy(pair[0]), pair[1]
    del model.pixel_mean
    unknown = Preprocessing("BGR", type(model).preprocess_image)
    assert preprocessing_of(model, "BGR") == unknown != teacher.preprocessing


def test_an_own_preprocessing_without_statistics_is_warned_of_once(pair, caplog, monkeypatch):
    teacher, images = pair[1], torch.zeros(1, 3, 64, 64)
    monkeypatch.setattr(teacher, "checked", False)
    for _ in range(2):
        teacher(image_batch((64, 64)), images, Preprocessing("BGR", flipped))
    assert caplog.text.count("flipped is your own, and the model has no pixel_mean") == 1


def flipped(self, inputs):
    images = GeneralizedRCNN.preprocess_image(self, inputs)
    images.tensor = images.tensor.flip(-1)
    return images


def flipped_one_by_one(self, inputs):
    turned = [{**x, "image": x["image"].flip(-1)} for x in inputs]
    return GeneralizedRCNN.preprocess_image(self, turned)


@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0], "MODEL.PIXEL_STD", [2.0, 3.0, 4.0]),
        ("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]),
    ],
    ids=["equal", "normalisation", "channel order"],
)
def test_the_teacher_sees_what_a_students_own_preprocessing_made(student, monkeypatch, opts):
    plain = student(*opts)
    plain.distiller.build_teacher(CPU)
    batch = image_batch((96, 128))
    turned = [{**batch[0], "image": batch[0]["image"].flip(-1)}]
    expected, _ = plain.distiller.teacher(
        turned, plain.preprocess_image(turned).tensor, plain.preprocessing
    )
    monkeypatch.setattr(type(plain), "preprocess_image", flipped)
    images = plain.preprocess_image(batch).tensor
    found, _ = plain.distiller.teacher(
        batch, images, preprocessing_of(plain, image_format_of(plain))
    )
    for level, x in expected.items():
        torch.testing.assert_close(found[level], x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change", [lambda x: x / 255, lambda x: x[..., ::2]], ids=["scale", "size"]
)
def test_a_preprocessing_that_cannot_be_undone_is_refused(pair, monkeypatch, change):
    model, teacher = pair
    monkeypatch.setattr(type(model), "preprocess_image", lambda self, inputs: None)
    mean, std = model.pixel_mean, model.pixel_std
    images = torch.stack([(change(x["image"].float()) - mean) / std for x in BATCH[:1]])
    with pytest.raises(ConfigError, match="do this in the mapper"):
        teacher(BATCH[:1], images, preprocessing_of(model, "BGR"))


def test_a_preprocessing_that_moves_images_into_the_padding_is_refused(student, monkeypatch):
    plain = student()
    plain.distiller.build_teacher(CPU)
    monkeypatch.setattr(type(plain), "preprocess_image", flipped)
    own = preprocessing_of(plain, image_format_of(plain))
    whole, padded = image_batch((64, 64)), image_batch((64, 64), (64, 96))
    with monkeypatch.context() as patch:
        patch.setattr(type(plain), "preprocess_image", flipped_one_by_one)
        allowed = preprocessing_of(plain, image_format_of(plain))
        plain.distiller.teacher(padded, plain.preprocess_image(padded).tensor, allowed)
    plain.distiller.build_teacher(CPU)  # a new one, which has checked nothing
    plain.distiller.teacher(whole, plain.preprocess_image(whole).tensor, own)
    with pytest.raises(ConfigError, match="flipped moves images into the padding"):
        plain.distiller.teacher(padded, plain.preprocess_image(padded).tensor, own)


@pytest.mark.parametrize(
    ("opts", "ignored"),
    [
        (("INPUT.MIN_SIZE_TEST", 64, "INPUT.FORMAT", "BGR"), "INPUT.MIN_SIZE_TEST has no effect"),
        (("INPUT.FORMAT", "BGR", "MODEL.RPN.NMS_THRESH", 0.6), ""),
    ],
)
def test_input_settings_of_a_teacher_are_said_to_be_ignored(teacher_file, caplog, opts, ignored):
    Teacher(TeacherSpec(CONFIG, teacher_file, opts), CPU)
    assert (ignored in caplog.text) if ignored else "no effect" not in caplog.text
