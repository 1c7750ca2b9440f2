"""A student never keeps random values unnoticed."""

import pytest
import torch
from ssimkd import ConfigError
from ssimkd.checkpoint.strict import StrictCheckpointer


@pytest.fixture
def model():
    return torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 3), "head": torch.nn.Linear(3, 4)})


def load(model, path, whole, **changes):
    torch.save({**model.state_dict(), **changes}, path)
    StrictCheckpointer(model, whole=whole).load(str(path))


@pytest.mark.parametrize("whole", [True, False])
def test_a_backbone_of_other_shapes_is_an_error(model, tmp_path, whole):
    load(model, tmp_path / "x.pth", whole)
    with pytest.raises(ConfigError, match=r"x.pth .*backbone.bias is \(1,\) instead of \(3,\)"):
        load(model, tmp_path / "x.pth", whole, **{"backbone.bias": torch.zeros(1)})


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_without_a_tensor_of_the_model_is_an_error(model, tmp_path, whole):
    torch.save({"nothing": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="x.pth .*backbone.weight is missing"):
        StrictCheckpointer(model, whole=whole).load(str(tmp_path / "x.pth"))


def test_a_head_of_other_classes_is_a_warning_except_where_all_is_needed(model, tmp_path, caplog):
    head = {"head.weight": torch.zeros(9, 3), "head.bias": torch.zeros(9)}
    load(model, tmp_path / "x.pth", False, **head)
    assert "head.weight" in caplog.text
    with pytest.raises(ConfigError, match=r"head.weight is \(9, 3\) instead of \(4, 3\)"):
        load(model, tmp_path / "x.pth", True, **head)
