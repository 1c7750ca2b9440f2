"""Maps kept on disk: the same losses with and without, whatever happens to the folder."""

import copy
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import image_batch
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError
from ssimkd.teacher.cache import STEPS, TeacherCache, identify, pack, unpack
from ssimkd.teacher.frozen import Preprocessing, Teacher, TeacherSpec

CONFIG = "configs/shapes/teacher.yaml"
KEY = "MODEL.DISTILL.TEACHER"
CPU = torch.device("cpu")
BATCH = image_batch((96, 96), (64, 80), seed=3)


class Network(torch.nn.Module):
    """A backbone that counts the images it is shown."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.shown = 0

    @torch.no_grad()
    def forward(self, images):
        self.shown += len(images)
        fine = self.conv(images)
        return {"p2": fine, "p3": fine[..., ::2, ::2].contiguous()}


def files(folder):
    return sorted(Path(folder).glob("*.maps"))


def images_of(count, seed=0, size=(16, 24)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[level], b[level]) for level in a)


# --- what a file holds ---


def test_a_value_comes_back_to_half_a_step_of_its_channel():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 13, 7, generator=generator)
    x *= torch.tensor([1e-30, 1e-6, 1, 1e3, 1e6, 1e30]).view(-1, 1, 1)  # float16 ends at 65504
    x[2] += 50  # far from 0 with little range: float16 would keep 5 bits of it
    back = unpack(pack({"p2": x, "p3": x[:2, :1]}))
    assert list(back) == ["p2", "p3"] and back["p3"].shape == (2, 1, 7)
    spread = x.amax((1, 2)) - x.amin((1, 2))
    error = (back["p2"] - x).abs().amax((1, 2))
    rounding = 2**-23 * x.abs().amax((1, 2))  # of float32 itself
    assert (error <= spread / STEPS / 2 * 1.01 + rounding).all()


def test_constant_channels_and_single_cells_are_exact():
    x = torch.tensor([0.0, -3.7, 1e-40]).view(3, 1, 1)
    assert torch.equal(unpack(pack({"p6": x}))["p6"], x)
    wide = x.expand(3, 4, 5)
    assert torch.equal(unpack(pack({"p6": wide}))["p6"], wide)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_is_not_kept(tmp_path, bad):
    cache = TeacherCache(str(tmp_path), 1, Network(), "")

    def run(images):
        maps = {"p2": torch.zeros(len(images), 2, 3, 3)}
        maps["p2"][0, 1, 1, 1] = bad
        return maps

    found = cache(run, images_of(2))["p2"]
    assert not found[0, 1].isfinite().any() and found[0, 0].isfinite().all()
    assert len(files(tmp_path)) == 1


# --- hits and misses ---


def test_only_new_images_are_run_and_give_the_same_maps(tmp_path):
    network, images = Network(), images_of(5)
    cache = TeacherCache(str(tmp_path), 1, network, "")
    first = cache(network, images[:3])
    assert network.shown == 3 and len(files(tmp_path)) == 3
    both = cache(network, images[[4, 1, 3, 0]])
    assert network.shown == 5
    other = TeacherCache(str(tmp_path / "other"), 1, network, "")
    assert equal(both, other(network, images[[4, 1, 3, 0]]))
    assert all(torch.equal(both[level][1], first[level][1]) for level in both)
    again = TeacherCache(str(tmp_path), 1, network, "")  # another run
    shown = network.shown
    assert equal(again(network, images[[4, 1, 3, 0]]), both) and network.shown == shown
    exact = network(images[[4, 1, 3, 0]])
    for level, x in exact.items():
        assert 0 < (both[level] - x).abs().max() < 1e-4


def test_every_change_of_what_is_shown_is_new(tmp_path):
    network, images = Network(), images_of(1)
    cache = TeacherCache(str(tmp_path), 1, network, "")
    shown = [
        images,
        images.flip(-1),
        torch.nn.functional.pad(images, (0, 8)),  # padded to a larger batch
        images.reshape(1, 3, 24, 16),  # the same bytes
        images + 1e-3,
    ]
    for number, x in enumerate(shown, start=1):
        cache(network, x)
        assert network.shown == number
        cache(network, x)
        assert network.shown == number


def test_teachers_share_a_folder(tmp_path):
    first, second, images = Network(0), Network(1), images_of(2)
    for network, settings in ((first, "a"), (second, "a"), (first, "b")):
        found = TeacherCache(str(tmp_path), 1, network, settings)(network, images)
        torch.testing.assert_close(found["p2"], network(images)["p2"], rtol=0, atol=1e-4)
    assert len(files(tmp_path)) == 6


def test_an_identity_is_that_of_weights_and_settings_alone():
    one = Network()
    same = identify(copy.deepcopy(one), "norm: <function BN at 0x7f01>")
    assert identify(one, "norm: <function BN at 0x7eff>") == same
    assert identify(one, "norm: <function GN at 0x7f01>") != same
    with torch.no_grad():
        one.conv.bias[0] = torch.nextafter(one.conv.bias[0], torch.tensor(9.0))
    assert identify(one, "norm: <function BN at 0x7f01>") != same


# --- what happens to the folder ---


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
def test_a_damaged_file_is_computed_anew(tmp_path, damage, caplog):
    network, images = Network(), images_of(2)
    cache = TeacherCache(str(tmp_path), 1, network, "")
    expected = cache(network, images)
    path = files(tmp_path)[0]
    whole = path.read_bytes()
    spoiled = bytearray(whole)
    spoiled[-3] ^= 1
    path.write_bytes({"cut": whole[:-9], "empty": b"", "flipped": spoiled, "text": b"?"}[damage])
    with caplog.at_level(logging.WARNING):
        found = cache(network, images)
    assert f"{path} is damaged" in caplog.text and network.shown == 3
    assert equal(cache(network, images), found) and network.shown == 3  # it is whole again
    for level, x in expected.items():  # one step: a convolution of fewer images rounds otherwise
        torch.testing.assert_close(found[level], x, rtol=0, atol=1e-4)


def test_a_full_folder_takes_no_more_and_says_so_once(tmp_path, caplog):
    network, images = Network(), images_of(6)
    TeacherCache(str(tmp_path), 1, network, "")(network, images[:1])
    size = files(tmp_path)[0].stat().st_size
    cache = TeacherCache(str(tmp_path), 3.5 * size / 2**30, network, "")
    with caplog.at_level(logging.WARNING):
        found = [cache(network, images[i : i + 1]) for i in range(6)]
    assert len(files(tmp_path)) == 3
    assert caplog.text.count(f"No more of the teacher's maps go to {tmp_path}") == 1
    assert "CACHE_GIB" in caplog.text
    for i, maps in enumerate(found):  # rounded all the same: room makes no difference
        assert equal(maps, cache(network, images[i : i + 1]))
        assert equal(
            maps, TeacherCache(str(tmp_path / "x"), 1, network, "")(network, images[i:][:1])
        )


def test_a_folder_that_cannot_be_written_costs_nothing_but_speed(tmp_path, caplog, monkeypatch):
    network, images = Network(), images_of(2)
    cache = TeacherCache(str(tmp_path), 1, network, "")

    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with caplog.at_level(logging.WARNING):
        cache(network, images)
    assert caplog.text.count("No space left on device") == 1 and not list(tmp_path.iterdir())
    assert cache(network, images)["p2"].shape[0] == 2


def test_a_folder_that_cannot_be_made_names_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"{KEY}.CACHE: .*file"):
        TeacherCache(str(tmp_path / "file"), 1, Network(), "")


def test_what_a_stopped_process_left_is_removed_in_time(tmp_path):
    old, young = tmp_path / "a.maps.1.tmp", tmp_path / "b.maps.2.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    TeacherCache(str(tmp_path), 1, Network(), "")
    assert not old.exists() and young.exists()


def test_files_that_vanish_while_they_are_counted_stop_nothing(tmp_path, monkeypatch):
    # as those of other processes, which are renamed when they are whole
    (tmp_path / "a.maps.1.tmp").symlink_to(tmp_path / "renamed")
    old = tmp_path / "b.maps.2.tmp"
    old.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    remove = os.remove
    with monkeypatch.context() as patch:  # another process removes it first
        patch.setattr(os, "remove", lambda path: (remove(path), remove(path)))
        cache = TeacherCache(str(tmp_path), 1, Network(), "")
    cache(Network(), images_of(2))
    assert cache.storing and len(files(tmp_path)) == 2


@torch.no_grad()
def fill(folder, seed):
    network = Network()
    cache = TeacherCache(folder, 1, network, "")
    generator = torch.Generator().manual_seed(seed)
    for i in torch.randperm(40, generator=generator):
        image = images_of(40)[i : i + 1]
        found = cache(network, image)
        torch.testing.assert_close(found["p2"], network(image)["p2"], rtol=0, atol=1e-4)
    assert cache.storing


def test_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(str(tmp_path), seed)) for seed in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(files(tmp_path)) == len(list(tmp_path.iterdir())) == 40


# --- in a student ---


def losses_of(model):
    torch.manual_seed(5)
    with EventStorage(0):
        return model(BATCH)


def test_losses_are_the_same_with_and_without(student, tmp_path):
    expected = losses_of(student())["ssim_kd_loss"]
    model = student(f"{KEY}.CACHE", str(tmp_path))
    filling = losses_of(model)["ssim_kd_loss"]
    assert len(files(tmp_path)) == 2
    model.distiller.teacher.network = None  # it is not needed any more
    reading = losses_of(model)["ssim_kd_loss"]
    assert torch.equal(filling, reading)
    # values are rounded by 2**-17 of their channel's range, and these are its first four digits
    assert reading.item() == pytest.approx(expected.item(), rel=1e-4)


def test_gradients_are_the_same_with_and_without(student, tmp_path):
    plain, cached = student(), student(f"{KEY}.CACHE", str(tmp_path))
    for model in (plain, cached):
        losses_of(model)["ssim_kd_loss"].backward()
    a, b = (torch.cat([p.grad.flatten() for p in m.backbone.parameters()]) for m in (plain, cached))
    assert 0 < (a - b).norm() <= 1e-3 * a.norm()


def test_config_and_precision_are_part_of_the_name(teacher_file, tmp_path):
    specs = [
        TeacherSpec(CONFIG, teacher_file, cache=str(tmp_path)),
        TeacherSpec(CONFIG, teacher_file, ["MODEL.FPN.FUSE_TYPE", "avg"], cache=str(tmp_path)),
        TeacherSpec(CONFIG, teacher_file, precision="bfloat16", cache=str(tmp_path)),
    ]
    for count, spec in enumerate(specs, start=1):
        for _ in range(2):  # built twice: the same name
            Teacher(spec, CPU)(BATCH[:1], torch.zeros(0), Preprocessing("BGR"))
        assert len(files(tmp_path)) == count
