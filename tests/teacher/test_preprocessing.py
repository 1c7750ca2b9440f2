"""When the teacher uses the images that the student has prepared, and when it prepares its own."""

import copy

import pytest
import torch
from conftest import image_batch
from ssimkd.teacher.frozen import Teacher
from ssimkd.teacher.preprocessing import Preprocessing, preprocessing_of
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
    assert preprocessing_of(model, "BGR") == Preprocessing("BGR") != teacher.preprocessing
