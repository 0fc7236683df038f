"""Chooses the faster of two equivalent computations, if that rounds nothing away.

I in_features, O out_features, N num_blocks, R the largest rank of a block, T tokens.
"""

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)
"""The dtypes with enough precision for W + Δ and G of `adapted_linear` to keep what training adds."""


def is_merged(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, rate: float) -> bool:
    """Returns whether computing W + Δ is faster than adding to the slices of T rows, and rounds nothing away.

    Measured (benchmarks/results/NOTES.md): a value of the slices takes 8 + R units of time, mostly to read and write
    it, and an element of W + Δ takes 20 + R / N.
    """
    if rate or weight.dtype not in WIDE or x.dtype != weight.dtype:
        return False
    num_blocks, rank, width = lora_a.shape
    height = lora_b.size(1)
    num_tokens = x.numel() // x.size(-1)
    adding = num_tokens * num_blocks * (width + height) * (8 + rank)
    merging = weight.numel() * 20 + num_blocks * width * height * rank
    return adding > merging


def is_by_blocks(x: Tensor, of_y: Tensor, lora_a: Tensor) -> bool:
    """Returns whether A' and B' take fewer operations by blocks than by factors, and G rounds nothing away."""
    num_blocks, rank, _ = lora_a.shape
    in_features = x.size(-1)
    out_features = of_y.size(-1)
    return x.dtype in WIDE and 2 * rank * num_blocks * (in_features + out_features) > in_features * out_features
