"""Tensors by blocks: the views and factors that a block-diagonal update is made of.

N num_blocks, I in_features, O out_features, P parts of `split`, O_p out_features of one part.
"""

from collections.abc import Iterator, Sequence

import torch

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
