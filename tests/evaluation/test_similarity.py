"""Maps of similarity agree with the loss, and show where features were changed."""

import numpy as np
import pytest
import torch
from conftest import image_batch
from detectron2.utils.events import EventStorage
from ssimkd.evaluation.similarity import (
    NAMES,
    SIMILARITIES,
    TILE,
    cell_maps,
    in_colour,
    normalized_pairs,
    render,
    scales,
    similarity_maps,
)
from ssimkd.modeling.distiller import Captured

SIZE = (100, 125)  # Only the rows of p2 are whole cells.
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


@pytest.mark.parametrize("opts", [(), ("MODEL.DISTILL.SSIM.NORMALIZE", "standardize")])
def test_their_mean_over_the_cells_is_the_loss(student, opts):
    model, batch = student(*opts).eval(), image_batch(SIZE)
    images = model.preprocess_image(batch).tensor
    with torch.no_grad(), EventStorage() as storage:
        model.distiller(Captured(batch, model.backbone(images), images, model.preprocessing))
        expected = storage.latest()
    pairs = dict(normalized_pairs(model, batch[0]))
    assert list(pairs) == list(STRIDES)
    for level, pair in pairs.items():
        assert pair.student.shape[-2:] == tuple(-(-n // STRIDES[level]) for n in SIZE)
        similarity = cell_maps(pair)["SSIM"].mean()
        loss = expected[f"ssim_kd/{level}"][0]
        assert float((1 - similarity) / 2) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("border", ["reflect", "valid"])
def test_luminance_contrast_and_structure_multiply_to_ssim(student, border):
    model = student("MODEL.DISTILL.SSIM.BORDER", border)
    pair = dict(normalized_pairs(model, image_batch(SIZE)[0]))["p2"]
    maps = cell_maps(pair)
    product = torch.stack([maps[name] for name in SIMILARITIES]).prod(dim=0)
    edge = 5 if border == "valid" else 0  # half a window of 11
    inner = (slice(None), slice(edge, 25 - edge), slice(edge, 32 - edge))
    assert torch.allclose(product[inner], maps["SSIM"][inner], atol=1e-4)
    assert int(maps["SSIM"].isnan().sum()) == 64 * (25 * 32 - (25 - 2 * edge) * (32 - 2 * edge))
    assert torch.equal(maps["(S-T)^2"], (pair.student - pair.teacher)[0] ** 2)
    assert torch.equal(maps["|S-T|"] ** 2, maps["(S-T)^2"])


def test_a_changed_cell_shows_at_its_pixels(student):
    model, x = student(), image_batch(SIZE)[0]
    pair = dict(normalized_pairs(model, x))["p3"]
    before = similarity_maps(model, x)
    taught = model.distiller.teacher.model.backbone

    def change(module, inputs, output):
        output["p3"][0, 0, 4, 6] += 0.5 * (output["p3"][0, 0].max() - output["p3"][0, 0, 4, 6])

    handle = taught.register_forward_hook(change)
    after = similarity_maps(model, x)
    handle.remove()
    moved = np.argwhere(before["p3"]["|S-T|"] != after["p3"]["|S-T|"])
    assert pair.stride == 8
    assert (moved.min(0) == [32, 48]).all() and (moved.max(0) == [39, 55]).all()
    assert all(np.array_equal(before["p2"][name], after["p2"][name]) for name in NAMES)


def test_nothing_of_the_model_changes(student):
    model, x = student(), image_batch(SIZE)[0]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    maps = similarity_maps(model, x)
    state = model.state_dict()
    assert model.training and all(
        torch.equal(state[name], value) for name, value in weights.items()
    )
    assert {m.shape for by_name in maps.values() for m in by_name.values()} == {SIZE}
    assert [list(by_name) for by_name in maps.values()] == [list(NAMES)] * len(maps)


def test_several_teachers_are_named_and_none_gives_no_maps(teacher_file, student):
    teacher = {"CONFIG": "configs/shapes/teacher.yaml", "WEIGHTS": teacher_file}
    entries = [{"NAME": "one", **teacher}, {"LOSSES": ("l2",), "IN_FEATURES": ["p4"], **teacher}]
    model = student("MODEL.DISTILL.TEACHERS", entries, "MODEL.DISTILL.TEACHER.CONFIG", "")
    found = list(similarity_maps(model, image_batch(SIZE)[0]))
    assert found == ["one/p2", "one/p3", "one/p4", "one/p5", "teacher2/p4"]
    assert similarity_maps(student("MODEL.DISTILL.LOSSES", ()), image_batch(SIZE)[0]) == {}


def test_colours_go_from_alike_to_different():
    shown = in_colour(np.array([[0.0, 0.5, 1.0, 2.0, np.nan]]), (0.0, 1.0)).astype(int).sum(axis=-1)
    assert shown[0, 0] < shown[0, 1] < shown[0, 2] == shown[0, 3] and shown[0, 4] == 3 * 128


def test_a_picture_holds_every_map_at_its_place(student):
    image = np.random.default_rng(0).integers(0, 256, (96, 188, 3), np.uint8)
    x = {"image": torch.from_numpy(image).permute(2, 0, 1).flip(0)}
    maps = similarity_maps(student(), x)
    picture, scale = render(maps, image), scales(maps)
    assert picture.dtype == np.uint8 and picture.shape[1] == TILE * (len(NAMES) + 1)
    height = (picture.shape[0] - 32) // len(maps)  # The bars below are 18 + 10 + 4 pixels high.
    assert (picture[height : len(maps) * height, :TILE] == 255).all()  # The image is shown once.
    for row, level in enumerate(maps):
        for column, name in enumerate(NAMES, start=1):
            place = picture[row * height : (row + 1) * height][:, column * TILE :][:, :TILE]
            assert (place[18:-4, 2:-2] == in_colour(maps[level][name], scale[name])).all()
