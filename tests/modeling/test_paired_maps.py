"""The maps of student and teacher outside of training."""

import pytest
import torch
from conftest import image_batch
from ssimkd.modeling.backbones import TorchvisionBackbone
from ssimkd.modeling.paired_maps import evaluation_mode, paired_outputs

BATCH = image_batch((96, 96), (96, 128))


@pytest.mark.parametrize("training", [False, True])
def test_they_are_the_backbones_in_evaluation_mode(student, training):
    model = student().train(training)
    model.roi_heads.eval()  # as a user may have frozen a part
    modes = [module.training for module in model.modules()]
    maps, teacher, *_ = paired_outputs(model, model.distiller, BATCH)
    assert [module.training for module in model.modules()] == modes
    assert not model.backbone._forward_hooks
    with torch.no_grad():
        expected = model.eval().backbone(model.preprocess_image(BATCH).tensor)
    for level, value in maps.items():
        assert torch.equal(value, expected[level]) and value.shape == teacher[level].shape


def test_a_network_of_torchvision_runs_its_training_code_again_afterwards():
    """Its graph for evaluation has no stochastic depth."""
    body = TorchvisionBackbone("efficientnet_b0").body
    with evaluation_mode(body):
        assert body.graph is body.eval_graph
    assert body.graph is body.train_graph
