"""Attention, torch's and hand-written, and torch's transformer layers."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from support.hand_written.case import EITHER, case, matrix
from support.models import IN, OUT

AREA = "Attention"
SEQUENCE = (2, 4, IN)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(IN, 2, batch_first=True)
        self.fc = nn.Linear(IN, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0])


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(IN, 2, OUT, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(IN, 2, OUT, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(IN, 2, OUT, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x.flip(1))


def _of(name: str, what: str, build: type[nn.Module], targets: Any, outcome: str = "correct", **options: Any) -> None:
    case(AREA, what, targets, outcome, name=name, shape=SEQUENCE, **options)(build)


_of("beside-attention", "a linear after nn.MultiheadAttention", _Attention, "fc")
_of(
    "attention-out",
    "`out_proj` of nn.MultiheadAttention, which is never called",
    _Attention,
    "attention.out_proj",
    EITHER,
    base_tolerance=1e-5,
)
_of(
    "attention-in",
    "`in_proj_weight` of nn.MultiheadAttention",
    _Attention,
    "attention.in_proj_weight",
    EITHER,
    base_tolerance=1e-5,
)
_of(
    "encoder-layer",
    "nn.TransformerEncoderLayer, whose fast path reads its weights",
    _Encoder,
    ("layer.linear1", "layer.linear2"),
    base_tolerance=1e-5,
)
_of(
    "encoder-layer-first",
    "nn.TransformerEncoderLayer, one of its linears",
    _Encoder,
    "layer.linear1",
    base_tolerance=1e-5,
)
_of(
    "encoder-layer-attention",
    "nn.TransformerEncoderLayer, its `out_proj`",
    _Encoder,
    "layer.self_attn.out_proj",
    EITHER,
    base_tolerance=1e-5,
)
_of(
    "encoder",
    "nn.TransformerEncoder",
    _Layers,
    ("encoder.layers.0.linear1", "encoder.layers.1.linear2"),
    base_tolerance=1e-5,
)
_of("decoder-layer", "nn.TransformerDecoderLayer", _Decoder, ("layer.linear1", "layer.linear2"))


@case(AREA, "hand-written attention: three matrices, `scaled_dot_product_attention`", ("q", "k", "v"), shape=SEQUENCE)
class AttentionByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (matrix(IN, IN, seed) for seed in (11, 12, 13))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = ((x @ w).unflatten(-1, (2, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)


@case(
    AREA,
    "attention pooling as in CLIP: `F.multi_head_attention_forward` with the weights of linears",
    ("q", "k", "v", "out"),
    EITHER,
    shape=SEQUENCE,
)
class AttentionPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(IN, IN) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.multi_head_attention_forward(
            x[:1],
            x,
            x,
            IN,
            2,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.out.weight,
            out_proj_bias=self.out.bias,
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
            need_weights=False,
        )[0]
