"""The function that shows that a refusal changed nothing must notice every change."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.models import assert_unchanged
from torch import nn


class Model(nn.Module):
    """Contains one of everything."""

    def __init__(self, cache: list[Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("steps", torch.zeros(2))
        self.cache = cache
        self.sizes = {"x": [1, 2], "y": {3}}
        self.held = [torch.zeros(2)]
        self.scale = 2.0
        self.nothing = None


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a bit of a parameter": lambda m: m.inner.weight.data[0, 0].neg_(),
    "another parameter": lambda m: setattr(m.inner, "weight", nn.Parameter(m.inner.weight.detach())),
    "a version": lambda m: m.inner.weight.detach().add_(0),
    "requires_grad": lambda m: m.inner.bias.requires_grad_(False),
    "a gradient": lambda m: m.inner(torch.zeros(3)).sum().backward(),
    "a buffer": lambda m: m.steps.data.add_(1),
    "a new buffer": lambda m: m.inner.register_buffer("more", torch.zeros(1)),
    "a persistent buffer": lambda m: m._non_persistent_buffers_set.add("steps"),
    "a class": lambda m: setattr(m.inner, "__class__", type("Other", (nn.Linear,), {})),
    "a forward": lambda m: setattr(m.inner, "forward", m.inner.forward),
    "a hook": lambda m: m.inner.register_forward_hook(lambda *_: None),
    "the training flag": lambda m: m.inner.eval(),
    "a plain value": lambda m: setattr(m, "scale", 3.0),
    "a type": lambda m: setattr(m, "scale", 2),
    "an attribute less": lambda m: delattr(m, "nothing"),
    "an item of a list in a dict": lambda m: m.sizes["x"].append(3),
    "an item of a set in a dict": lambda m: m.sizes["y"].add(4),
    "an equal copy of a list": lambda m: setattr(m, "cache", list(m.cache)),
    "a tensor in a list": lambda m: m.held[0].data.add_(1),
    "a container beside the model": lambda _: CACHE.append(1),
    "torch's random state": lambda _: torch.rand(1),
    "Python's random state": lambda _: random.random(),
    "NumPy's random state": lambda _: np.random.rand(),
    "grad mode": lambda _: torch.set_grad_enabled(False),
    "default dtype": lambda _: torch.set_default_dtype(torch.float64),
    "autocast": lambda _: torch.set_autocast_enabled("cpu", True),
}
CACHE: list[Any] = []


@pytest.fixture
def model():
    yield Model([])
    CACHE.clear()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_autocast_enabled("cpu", False)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change: Callable[[Any], Any], model: nn.Module) -> None:
    with torch.no_grad():
        model.inner.weight[0, 0] = 0.0
    with pytest.raises(AssertionError, match="changed: "), assert_unchanged(model, also=[CACHE]):
        change(model)


def test_reading_is_no_change(model: nn.Module) -> None:
    with assert_unchanged(model, also=[CACHE]):
        model.inner(torch.zeros(3)).sum()
        list(model.named_parameters()), model.state_dict(), repr(model)
