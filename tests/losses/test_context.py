import pytest
import torch
from detectron2.structures import Instances, RotatedBoxes
from ssimkd import KD_LOSS_REGISTRY, ConfigError
from ssimkd.losses import Context


def test_cells_are_rounded_up_and_end_with_the_map():
    context = Context([(64, 96), (33, 17), (1, 200)], {"p3": 8, "p6": 64})
    # 33 / 8 = 4.1 -> 5, 17 / 8 = 2.1 -> 3, 1 / 8 -> 1; 200 / 8 = 25, but the map has 12 columns
    assert context.cells("p3", torch.zeros(3, 2, 8, 12)) == [(8, 12), (5, 3), (1, 12)]
    # stride 64: an image smaller than one cell has one; 96 / 64 -> 2
    assert context.cells("p6", torch.zeros(3, 2, 1, 2)) == [(1, 2), (1, 1), (1, 2)]
    context.mask_padding = False
    assert context.cells("p3", torch.zeros(3, 2, 8, 12)) == [(8, 12)] * 3


def test_inside_marks_the_cells_of_each_image():
    context = Context([(17, 40), (24, 9)], {"p3": 8})
    expected = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    expected[0, 0, :3, :5] = True  # 17 / 8 -> 3, 40 / 8 = 5
    expected[1, 0, :3, :2] = True  # 24 / 8 = 3, 9 / 8 -> 2
    assert torch.equal(context.inside("p3", torch.zeros(2, 7, 4, 5)), expected)
    assert context.inside("p3", torch.zeros(2, 7, 3, 2)) is None  # images fill the map
    context.mask_padding = False
    assert context.inside("p3", torch.zeros(2, 7, 4, 5)) is None


def test_crops_group_images_of_equal_cells():
    context = Context([(32, 40), (17, 9), (32, 40), (24, 16)], {"p3": 8})
    student = torch.arange(4.0 * 2 * 4 * 5).view(4, 2, 4, 5)
    groups = list(context.crops("p3", student, -student[:, :1]))
    assert [share for _, share in groups] == [0.5, 0.5]
    # 17 x 9 and 24 x 16 pixels are 3 x 2 cells both
    for (maps, _), images, (h, w) in zip(groups, ([0, 2], [1, 3]), ((4, 5), (3, 2))):
        assert torch.equal(maps[0], student[images, :, :h, :w])
        assert torch.equal(maps[1], -student[images, :1, :h, :w])


def test_crops_of_equal_images_are_views_of_the_maps():
    maps = torch.zeros(3, 2, 4, 5)
    ((cropped, share),) = Context([(30, 20)] * 3, {"p3": 8}).crops("p3", maps)
    assert share == 1.0
    assert cropped[0].shape == (3, 2, 4, 3) and cropped[0].data_ptr() == maps.data_ptr()


def test_a_mean_counts_each_image_once():
    context = Context([(32, 40), (17, 9), (32, 40)], {"p3": 8})
    maps = torch.arange(3.0 * 2 * 4 * 5).view(3, 2, 4, 5).square()
    sizes = context.cells("p3", maps)
    means = [image[:, :h, :w].mean() for image, (h, w) in zip(maps, sizes)]
    found = context.mean("p3", lambda a, b: (a + b).mean(), maps, -2 * maps)
    torch.testing.assert_close(found, -torch.stack(means).mean())


@pytest.mark.parametrize("loss", ["fgd", "defeat", "icd"])
@pytest.mark.parametrize("boxes", [RotatedBoxes(torch.ones(1, 5)), None], ids=["rotated", "none"])
def test_a_loss_that_needs_boxes_refuses_others_by_its_name(loss, boxes):
    instances = Instances((8, 8), gt_classes=torch.zeros(1).long())
    if boxes is not None:
        instances.gt_boxes = boxes
    context = Context([(8, 8)], {"p3": 8}, [instances])
    with pytest.raises(ConfigError, match=f"LOSSES: {loss} needs upright boxes"):
        KD_LOSS_REGISTRY.get(loss)()({"p3": torch.ones(1, 2, 1, 1)}, {}, context)
