"""The state of the random generators can be kept in a checkpoint and preserved around a block."""

import random

import numpy as np
import pytest
import torch
from ssimkd.utils.random_state import get_random_state, preserve_random_state, set_random_state


def test_random_state_survives_a_checkpoint(tmp_path):
    torch.save(get_random_state(), tmp_path / "state.pth")
    expected = (random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist())
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert (
        random.random(),
        np.random.rand(),
        np.random.randn(),
        torch.rand(3).tolist(),
    ) == expected


def test_preserve_random_state_even_after_an_error():
    expected = str(get_random_state())
    with pytest.raises(KeyError), preserve_random_state():
        torch.rand(1), np.random.rand(), random.random()
        raise KeyError
    assert str(get_random_state()) == expected
