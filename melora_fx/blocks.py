"""Tensors by blocks: the views and factors that a block-diagonal update is made of.

A stack of E matrices, the experts of a mixture, has the tensors of E adapters one after the other: block i of expert e
is number e·N + i. So every adapter's tensors have three dimensions, in memory and in files.

N num_blocks, I in_features, O out_features, P parts of `split`, O_p out_features of one part, R rank.
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
    """s_i of each block of `like` (E·N, …) as (E·N, 1, 1), of its dtype and on its device."""
    scalings = torch.tensor(config.scalings, dtype=like.dtype, device=like.device)
    return scalings.repeat(like.size(0) // config.num_blocks).view(-1, 1, 1)


def num_matrices(weight: torch.Tensor) -> int:
    """E of a stack (E, …, …); 1 for a matrix."""
    return weight.size(0) if weight.dim() == 3 else 1


def by_matrix(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(weight (O, I), lora_a (N, P·R, I/N), lora_b (N, O/N, R)) of each matrix of a stack, or of the one: views."""
    if weight.dim() == 2:
        yield weight, lora_a, lora_b
        return
    number = len(weight)
    yield from zip(weight, lora_a.chunk(number), lora_b.chunk(number), strict=True)
