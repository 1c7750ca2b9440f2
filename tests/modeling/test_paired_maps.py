"""The maps of student and teacher outside of training."""

import pytest
import torch
from conftest import image_batch
from ssimkd.modeling.paired_maps import paired_maps

BATCH = image_batch((96, 96), (96, 128))


@pytest.mark.parametrize("training", [False, True])
def test_they_are_the_backbones_in_evaluation_mode(student, training):
    model = student().train(training)
    model.roi_heads.eval()  # as a user may have frozen a part
    modes = [module.training for module in model.modules()]
    maps, teacher = paired_maps(model, model.distiller, BATCH)
    assert [module.training for module in model.modules()] == modes
    assert not model.backbone._forward_hooks
    with torch.no_grad():
        expected = model.eval().backbone(model.preprocess_image(BATCH).tensor)
    for level, value in maps.items():
        assert torch.equal(value, expected[level]) and value.shape == teacher[level].shape
