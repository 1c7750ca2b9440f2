"""The check before training finds a wrong teacher, and changes nothing in the run."""

import copy
import logging
from dataclasses import replace
from itertools import chain, islice

import pytest
import torch
from conftest import image_batch, shapes_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN
from detectron2.structures import Boxes, Instances
from ssimkd import ConfigError
from ssimkd.data.shapes import FOLDER
from ssimkd.engine.preflight import LEAST_FOUND, count_found, prepare
from ssimkd.engine.settings import read_settings
from ssimkd.engine.yaml_driver import DistillTrainer
from ssimkd.teacher.spec import TeacherSpec
from ssimkd.utils.random_state import get_random_state

TEACHER = ("MODEL.DISTILL.TEACHER.WEIGHTS", "configs/shapes/teacher.pth")  # a trained one
SETTINGS = read_settings(shapes_cfg("ssimkd"))


class Loader:
    """Shows the images of the Shapes data that it was given."""

    def __init__(self, batches):
        self.batches = batches

    def peek(self, images):
        return self.batches


@pytest.fixture(scope="module")
def loader(few_shapes):
    """The Shapes data's training stream."""
    name, root = "preflight_train", f"{few_shapes}/{FOLDER}"
    register_coco_instances(name, {}, f"{root}/instances_train.json", f"{root}/train")
    yield DistillTrainer.build_train_loader(shapes_cfg("vanilla", "DATASETS.TRAIN", (name,)))
    DatasetCatalog.remove(name)


def records(caplog, level):
    """Messages of this package alone. torch may warn of a function that Detectron2 calls."""
    own = [r for r in caplog.records if r.name.startswith("ssimkd")]
    return [r.getMessage() for r in own if r.levelno == level]


def test_a_trained_teacher_passes(student, loader, caplog):
    caplog.set_level(logging.INFO)
    prepare(student(*TEACHER), loader, SETTINGS, resumed=False)
    found = [text for text in records(caplog, logging.INFO) if text.startswith("The teacher finds")]
    numbers = [int(word) for word in found[0].split() if word.isdigit()]
    assert numbers[2] == 8 and numbers[0] > 1.5 * LEAST_FOUND * numbers[1]
    assert not records(caplog, logging.WARNING)
    assert "Teacher and student agree cell by cell: p2 (64, " in caplog.text


def test_a_random_teacher_causes_a_warning(student, loader, caplog):
    prepare(student(), loader, SETTINGS, resumed=False)
    (warning,) = records(caplog, logging.WARNING)
    assert (
        warning.startswith("The teacher finds ") and "TEACHER.WEIGHTS belong to .CONFIG" in warning
    )


def test_a_missing_compiled_operator_is_an_error_that_says_so(student, loader, monkeypatch):
    def absent(self, x):
        raise ImportError("no module detectron2._C")

    model = student(*TEACHER)
    monkeypatch.setattr(FPN, "forward", absent)
    message = "or the student cannot run here, because an operator .* is missing: ImportError: no m"
    with pytest.raises(ConfigError, match=message):
        prepare(model, loader, SETTINGS, resumed=False)


def test_it_changes_no_weight_mode_random_state_or_image(student, loader):
    model = student(*TEACHER)
    weights, before = copy.deepcopy(model.state_dict()), get_random_state()
    stream = [[x["file_name"] for x in batch] for batch in islice(iter(loader), 3)]
    loader.batches = 0
    prepare(model, loader, SETTINGS, resumed=False)
    after = get_random_state()
    assert before["python"] == after["python"] and torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.training and model.backbone.training
    assert [[x["file_name"] for x in batch] for batch in islice(iter(loader), 3)] == stream
    loader.batches = 0


def test_the_images_shown_in_advance_are_those_that_training_reads(loader):
    peeked = loader.peek(20)  # batches of 8
    assert [len(batch) for batch in peeked] == [8, 8, 8] and loader.batches == 0
    taken = list(islice(iter(loader), 3))
    loader.batches = 0
    for a, b in zip(chain(*peeked), chain(*taken)):
        assert a["file_name"] == b["file_name"] and torch.equal(a["image"], b["image"])


def test_zero_images_switch_it_off(student, caplog):
    class Never:
        def peek(self, images):
            raise AssertionError

    model = student("MODEL.DISTILL.TEACHER.WEIGHTS", "nowhere.pth")
    prepare(model, Never(), replace(SETTINGS, check_images=0), resumed=False)


def test_plain_detectors_and_other_loaders_are_not_checked(student, caplog):
    prepare(build_model(shapes_cfg("vanilla")), None, SETTINGS, resumed=False)
    assert not caplog.records
    prepare(student(), iter([]), SETTINGS, resumed=False)
    assert "Detectron2's own but a list_iterator" in caplog.text


def test_a_teacher_without_trained_heads_is_not_checked_for_detections(
    student, loader, caplog, tmp_path, teacher_file
):
    state = torch.load(teacher_file)["model"]
    path = tmp_path / "backbone.pth"
    torch.save({"model": {k: v for k, v in state.items() if k.startswith("backbone.")}}, path)
    prepare(student("MODEL.DISTILL.TEACHER.WEIGHTS", str(path)), loader, SETTINGS, resumed=False)
    assert "The teacher's detections cannot be checked: its checkpoint does not hold" in caplog.text


def test_a_teacher_that_was_a_student_is_checked(student, loader, caplog):
    caplog.set_level(logging.INFO)
    opts = ["MODEL.META_ARCHITECTURE", "DistillRCNN", "MODEL.DISTILL.ADAPTER", "conv1x1"]
    opts += ["MODEL.DISTILL.TEACHER.CONFIG", "configs/shapes/vanilla.yaml"]
    prepare(student(*TEACHER, "MODEL.DISTILL.TEACHER.OPTS", opts), loader, SETTINGS, resumed=False)
    assert "The teacher finds" in caplog.text and "cannot be checked" not in caplog.text


def test_two_teachers_must_not_give_the_same_weights(teacher_file):
    entry = {"CONFIG": "configs/shapes/teacher.yaml", "WEIGHTS": teacher_file}
    teachers = [
        {**entry, "INHERIT": ["roi_heads"]},
        {**entry, "INHERIT": ["roi_heads.box_head"]},
    ]
    opts = ["MODEL.DISTILL.TEACHERS", teachers, "MODEL.DISTILL.TEACHER.CONFIG", ""]
    cfg = shapes_cfg("ssimkd", *opts, "MODEL.DISTILL.CHECK_IMAGES", 0)
    with pytest.raises(ConfigError, match="two teachers both set roi_heads.box_head"):
        prepare(build_model(cfg), None, read_settings(cfg), resumed=False)


def test_maps_that_do_not_agree_stop_the_run(student, loader, monkeypatch):
    forward = FPN.forward

    def shrunk(self, x):
        return {name: maps[..., 1:] for name, maps in forward(self, x).items()}

    model = student()
    model.distiller.build_teacher(torch.device("cpu"))
    monkeypatch.setattr(FPN, "forward", shrunk)
    with pytest.raises(ConfigError, match="the student's p2 is .* cells for images of"):
        prepare(model, loader, SETTINGS, resumed=False)
    assert model.training


def test_images_without_objects_cause_a_warning(student, caplog):
    prepare(student(), Loader([image_batch((96, 96), boxes=0)]), SETTINGS, resumed=False)
    assert "no objects in the images" in caplog.text


def test_a_teacher_without_detections_causes_a_warning(student, caplog, monkeypatch):
    detector, cfg, absent = TeacherSpec(
        "configs/shapes/teacher.yaml", "configs/shapes/teacher.pth"
    ).load(torch.device("cpu"))
    detector.proposal_generator = None  # as a Fast R-CNN, which wants proposals in the data
    monkeypatch.setattr(TeacherSpec, "load", lambda self, device: (detector, cfg, absent))
    model = student(*TEACHER)
    model.distiller.match = lambda *args: ({}, {}, {}, {})
    prepare(model, Loader([image_batch((96, 96))]), SETTINGS, resumed=False)
    assert "The teacher's detections cannot be checked: AssertionError" in caplog.text


def test_an_object_counts_as_found_if_one_of_the_best_detections_overlaps_it():
    """Two objects: the two best detections count. One finds an object; the third would as well."""
    detections = Instances((100, 100))
    detections.pred_boxes = Boxes(
        torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 40, 40]])
    )
    detections.scores = torch.tensor([0.9, 0.8, 0.7])
    targets = Instances((100, 100))
    targets.gt_boxes = Boxes(torch.tensor([[0.0, 0, 10, 12], [20, 20, 40, 40]]))
    assert count_found(detections, targets) == 1
    detections.scores = torch.tensor([0.9, 0.6, 0.7])
    assert count_found(detections, targets) == 2
    assert count_found(detections[:0], targets) == 0
    targets.gt_boxes = Boxes(torch.tensor([[0.0, 0, 10, 21], [70, 70, 80, 80]]))  # IoU 10/21
    assert count_found(detections, targets) == 0


def test_each_teacher_is_checked_and_named(teacher_file, loader, caplog):
    caplog.set_level(logging.INFO)
    entry = {"CONFIG": "configs/shapes/teacher.yaml", "WEIGHTS": teacher_file}
    teachers = [{**entry, "NAME": "a"}, {**entry, "NAME": "b"}]
    cfg = shapes_cfg(
        "ssimkd", "MODEL.DISTILL.TEACHERS", teachers, "MODEL.DISTILL.TEACHER.CONFIG", ""
    )
    prepare(build_model(cfg).train(), loader, read_settings(cfg), resumed=False)
    for name in "ab":
        assert f"Teacher {name} and student agree cell by cell" in caplog.text


@pytest.mark.parametrize("resumed, losses, inherits", [
    (False, ("ssim",), True), (True, ("ssim",), False), (False, (), False),
])  # fmt: skip
def test_a_new_student_inherits_and_a_resumed_or_plain_one_does_not(
    student, resumed, losses, inherits
):
    model = student("MODEL.DISTILL.LOSSES", losses)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = replace(SETTINGS, check_images=0, inherit={"": ["roi_heads"]})
    prepare(model, None, settings, resumed=resumed)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert bool(changed) == inherits and all(name.startswith("roi_heads.") for name in changed)


@pytest.mark.parametrize(
    ("opts", "iterations", "expected"),
    [
        (("MODEL.DISTILL.SSIM.WEIGHT", 0.0), 900, "learns nothing from the teacher by ssim: "),
        (("MODEL.DISTILL.LOSSES", ("ssim", "icd")), 90, "learns nothing from the teacher by icd: "),
        (("MODEL.DISTILL.WARMUP_ITERS", 5000), 900, "the losses never get their whole weight"),
        (("MODEL.DISTILL.WARMUP_ITERS", 500), 900, ""),
        (
            ("MODEL.DISTILL.WARMUP_ITERS", 500, "MODEL.DISTILL.STOP_ITER", 400),
            900,
            "distils in 400",
        ),
        (("MODEL.DISTILL.STOP_ITER", 901), 900, "the run ends before the distillation does"),
        (("MODEL.DISTILL.STOP_ITER", 900), 900, ""),
        (("MODEL.DISTILL.LOSSES", ("ssim", "l2"), "MODEL.DISTILL.L2.WEIGHT", 0.0), 900, ""),
    ],
)
def test_a_run_that_cannot_learn_from_its_teacher_says_so_once(
    student, caplog, opts, iterations, expected
):
    settings = replace(SETTINGS, iterations=iterations)
    batches = Loader([image_batch((96, 96), (96, 128))])
    prepare(student(*opts), batches, settings, resumed=False)
    warnings = [x for x in records(caplog, logging.WARNING) if "The teacher finds" not in x]
    assert [expected in x for x in warnings] == [True] * bool(expected)


def test_inheriting_without_losses_is_said_to_do_nothing(student, caplog):
    settings = replace(SETTINGS, inherit={"": ["neck"]})
    prepare(student("MODEL.DISTILL.LOSSES", ()), None, settings, resumed=False)
    assert "INHERIT has no effect, because LOSSES is ()" in caplog.text


def test_several_teachers_that_are_switched_off_are_no_error(teacher_file, caplog):
    entry = {"NAME": "a", "CONFIG": "configs/shapes/teacher.yaml", "WEIGHTS": teacher_file}
    opts = ["MODEL.DISTILL.TEACHERS", [{**entry, "INHERIT": ["neck"]}]]
    opts += ["MODEL.DISTILL.TEACHER.CONFIG", "", "MODEL.DISTILL.LOSSES", ()]
    cfg = shapes_cfg("ssimkd", *opts)
    prepare(build_model(cfg), None, read_settings(cfg), resumed=False)
    assert "INHERIT has no effect, because LOSSES is ()" in caplog.text
