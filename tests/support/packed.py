"""Packed linears as in other formats, a module that calls them, and a dataset."""

from typing import Any

import torch
import torch.multiprocessing
from torch import nn

from support.models import (
    IN,
    OUT,
)


class Lines(torch.utils.data.Dataset):
    """Random tokens to continue; the labels are the first `num_labels`, fewer for a sequence-to-sequence model."""

    def __init__(self, num_labels: int = 6) -> None:
        self.num_labels = num_labels
        self.tokens = torch.randint(3, 50, (24, 6), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index, : self.num_labels]}


class Packed(nn.Module):
    """Like GPTQ: the kernel has no gradient, and the bias is added after it."""

    def __init__(self, in_features: int = IN, out_features: int = OUT) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("codes", torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        with torch.no_grad():
            product = x @ self.codes.to(x.dtype).t() / 8
        return (product + self.bias) * scale


class Caller(nn.Module):
    def __init__(self, inner: nn.Module, **options: Any) -> None:
        super().__init__()
        self.inner = inner
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x=x, **self.options)
