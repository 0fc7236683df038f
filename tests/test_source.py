"""Reading a forward's source for weights that it takes past their owner."""

import pytest
import torch
from torch import nn

from melora_fx.source import weights_read_by_forward


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
    ("cls", "paths"),
    [
        (Reads, ("attention.inner",)),
        (Harmless, ()),
        (nn.MultiheadAttention, ("out_proj",)),
        (nn.Linear, ()),
        (type("NoSource", (nn.Module,), {"forward": eval("lambda self, x: self.inner.weight")}), ()),
    ],
    ids=["through_a_helper", "harmless", "MultiheadAttention", "Linear", "no_source"],
)
def test_children_whose_weight_is_read(cls: type[nn.Module], paths: tuple[str, ...]) -> None:
    assert weights_read_by_forward(cls) == paths


def test_the_encoder_layers_fast_path_is_seen() -> None:
    assert {"linear1", "linear2", "self_attn"} <= {
        path.split(".")[0] for path in weights_read_by_forward(nn.TransformerEncoderLayer)
    }
