"""Tensors by blocks: the factors of a block-diagonal update, and the views of what it changes.

N num_blocks, I in_features, O out_features, P parts of `split`, O_p out_features of one part.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .config import MELoRAConfig


def diagonal_blocks(weight: torch.Tensor, num_blocks: int, parts: Sequence[int]) -> Iterator[torch.Tensor]:
    """Views (N, O_p/N, I/N) of the blocks of `weight` (O, I) that an adapter changes, one for each part."""
    (row, column), offset = weight.stride(), weight.storage_offset()
    width = weight.size(1) // num_blocks
    for size in parts:
        height = size // num_blocks
        strides = (height * row + width * column, row, column)
        yield weight.as_strided((num_blocks, height, width), strides, offset)
        offset += size * row


def scaling_tensor(config: MELoRAConfig, like: torch.Tensor) -> torch.Tensor:
    """s_i of each block as (N, 1, 1), of the dtype and on the device of `like`."""
    return torch.tensor(config.scalings, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def new_adapter(
    config: MELoRAConfig, in_features: int, out_features: int, *, device: Any = None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """A fresh adapter: lora_a (N, P·R, I/N), initialised, and lora_b (N, O/N, R), zero. Padding of small ranks is zero.

    R is the largest of the block ranks, P the number of parts of `split`.
    """
    num_blocks, rank, num_parts = config.num_blocks, max(config.ranks), len(config.parts(out_features))
    lora_a = torch.zeros(num_blocks, num_parts, rank, in_features // num_blocks, device=device, dtype=dtype)
    for block, block_rank in enumerate(config.ranks):
        rows = lora_a[block, :, :block_rank]
        if config.init == "gaussian":
            nn.init.normal_(rows, std=1 / block_rank)
        else:
            bound = 1 / math.sqrt(in_features // num_blocks)
            nn.init.uniform_(rows, -bound, bound)
    lora_b = torch.zeros(num_blocks, out_features // num_blocks, rank, device=device, dtype=dtype)
    return lora_a.flatten(1, 2), lora_b
