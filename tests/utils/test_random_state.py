"""The state of the random generators can be kept in a checkpoint and preserved around a block."""

import random

import numpy as np
import pytest
import torch
from ssimkd.utils.random_state import get_random_state, preserve_random_state, set_random_state


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_random_state_survives_a_checkpoint(tmp_path):
    torch.save(get_random_state(), tmp_path / "state.pth")
    expected = draw()
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert draw() == expected


def test_preserve_random_state_even_after_an_error():
    expected = str(get_random_state())
    with pytest.raises(KeyError), preserve_random_state():
        draw()
        raise KeyError
    assert str(get_random_state()) == expected


def test_the_generator_of_every_gpu_is_kept(monkeypatch):
    """The model's GPU need not be the current one; a resume may see fewer of them."""
    states, put = [torch.tensor([1]), torch.tensor([2])], {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda x, device: put.update({device: x}))
    for count in (2, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=count: n)
        put.clear()
        set_random_state(get_random_state())
        assert put == dict(enumerate(states[:count]))
