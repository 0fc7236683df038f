"""Reading a forward's source for weights that it takes past their owner."""

import pytest
import torch
from torch import nn

from melora_fx.capture.bypassed import UNKNOWN, attributes_read_by_forward


class Reads(nn.Module):
    """Each method takes `self.inner.weight` another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.helper(x) if x.dim() > 2 else x

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.attention.inner.weight.T)

    def reset(self) -> None:
        nn.init.zeros_(self.other.weight)


class Harmless(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.inner.weight, torch.Tensor) and x.dtype != self.inner.weight.dtype:
            x = x.to(self.inner.weight.device).expand(self.inner.weight.shape[0], -1)
        return self.inner(x) + self.inner.bias + self.weight


@pytest.mark.parametrize(
    ("cls", "path"),
    [
        (Reads, ("attention", "inner", "weight", "T")),
        (nn.MultiheadAttention, ("out_proj", "weight")),
        (nn.TransformerEncoderLayer, ("linear1", "weight")),
    ],
    ids=["through_a_helper", "MultiheadAttention", "TransformerEncoderLayer"],
)
def test_attributes_that_are_read(cls: type[nn.Module], path: tuple[str, ...]) -> None:
    assert path in attributes_read_by_forward(cls)


@pytest.mark.parametrize(
    "cls",
    [
        Harmless,
        nn.Linear,
        type("NoSource", (nn.Module,), {"forward": eval("lambda self, x: self.inner.weight")}),
    ],
    ids=["harmless", "Linear", "no_source"],
)
def test_nothing_below_the_module_is_read(cls: type[nn.Module]) -> None:
    below = [path for path in attributes_read_by_forward(cls) if len(path) > 1 and path != ("inner", "bias")]
    assert not below


class Subscript(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.layers[0].weight)


class Local(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x.to(layer.weight.dtype) @ layer.weight
        return x


@pytest.mark.parametrize("cls", [Subscript, Local])
def test_weights_of_what_is_not_named_are_noticed(cls: type[nn.Module]) -> None:
    assert (UNKNOWN, "weight") in attributes_read_by_forward(cls)
