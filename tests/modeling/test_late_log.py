"""Scalars that a GPU computes reach the event storage later, with the iteration they belong to."""

import copy
import math
import pickle
from types import SimpleNamespace

import torch
from conftest import shapes_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from ssimkd.modeling.late_log import Kept, LateLog
from ssimkd.modeling.several_teachers import write_logs


class Copying:
    """Stands for the event after a GPU's copy, which has not come yet."""

    waited = False

    def query(self):
        return self.waited

    def synchronize(self):
        self.waited = True


def test_on_a_cpu_it_is_put_at_once_where_it_is_finite():
    log = LateLog()
    with EventStorage(7) as storage:
        log.put({"a": torch.tensor(1.5, requires_grad=True), "b": torch.tensor(math.nan)})
    assert storage.latest() == {"a": (1.5, 7)} and not log.kept


def test_what_a_gpu_has_not_copied_is_kept_until_it_is_asked_for():
    log, event = LateLog(), Copying()
    with EventStorage(3) as storage:
        log.kept.append(Kept(storage, 2, ("a",), torch.tensor([1.0]), event))
        log.put({"a": torch.tensor(2.0)})
        assert storage.latest() == {} and not event.waited  # in their order
        log.write()
        assert storage.history("a").values() == [(1.0, 2), (2.0, 3)]
        assert event.waited and storage.iter == 3


def test_a_later_put_finds_what_has_arrived():
    log, event = LateLog(), Copying()
    with EventStorage(3) as storage:
        log.kept.append(Kept(storage, 2, ("a",), torch.tensor([1.0]), event))
        event.waited = True
        log.put({"b": torch.tensor(2.0)})
    assert storage.latest() == {"a": (1.0, 2), "b": (2.0, 3)}


def test_a_copy_of_a_student_starts_without(student):
    log = student().distiller.log
    log.kept.append(SimpleNamespace(copied=Copying()))
    assert copy.deepcopy(log).kept == pickle.loads(pickle.dumps(log)).kept == []


def test_the_names_of_several_teachers_are_kept(teacher_file):
    entry = dict(CONFIG="configs/shapes/teacher.yaml", WEIGHTS=teacher_file, NAME="big")
    opts = ["MODEL.DISTILL.TEACHERS", [entry], "MODEL.DISTILL.TEACHER.CONFIG", ""]
    model = build_model(shapes_cfg("ssimkd", *opts, "MODEL.DISTILL.INHERIT", []))
    with EventStorage(3) as storage:
        kept = Kept(storage, 2, ("ssim_kd/p3",), torch.tensor([1.0]), Copying())
        model.distiller["big"].log.kept.append(kept)
        write_logs(model)
    assert storage.latest() == {"big/ssim_kd/p3": (1.0, 2)}
