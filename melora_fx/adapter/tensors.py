"""An adapter's tensors: their shapes and initial values, and the views of a weight that their update changes.

A stack of E matrices, the experts of a mixture, has the tensors of E adapters one after the other: block i of expert e
is number e·N + i. So an adapter's tensors always have three dimensions, in memory and in files.

N num_blocks, I in_features, O out_features, P parts of `split`, O_p out_features of one part, R rank.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from melora_fx.config import MELoRAConfig


def slices_of(tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The N equal slices of each row of (…, I) as (N, T, I/N): a view, if the tokens can be viewed as one axis."""
    features = tensor.size(-1)
    shape = (tensor.numel() // features, num_blocks, features // num_blocks)
    return tensor.reshape(shape).transpose(0, 1)


def diagonal_blocks(weight: torch.Tensor, num_blocks: int, parts: Sequence[int]) -> Iterator[torch.Tensor]:
    """Views (N, O_p/N, I/N) of the blocks of `weight` (O, I) that an adapter changes, one for each part."""
    row, column = weight.stride()
    offset = weight.storage_offset()
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


def features_of(weight: torch.Tensor, *, is_transposed: bool) -> tuple[int, int]:
    """(in_features, out_features) of a weight (O, I), or (I, O) where it `is_transposed`; of each matrix of a stack."""
    rows, columns = weight.shape[-2:]
    return (rows, columns) if is_transposed else (columns, rows)


def by_matrix(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(weight (O, I), lora_a (N, P·R, I/N), lora_b (N, O/N, R)) of each matrix of a stack, or of the one: views."""
    if weight.dim() == 2:
        yield weight, lora_a, lora_b
        return
    number = len(weight)
    yield from zip(weight, lora_a.chunk(number), lora_b.chunk(number), strict=True)


def new_adapter(
    config: MELoRAConfig,
    in_features: int,
    out_features: int,
    *,
    num_experts: int = 1,
    device: Any = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A fresh adapter: lora_a (E·N, P·R, I/N), initialised, and lora_b (E·N, O/N, R), zero.

    The rows of lora_a that pad a block of a rank below R, the largest, are zero too. E is num_experts.
    """
    a_shape, b_shape = config.adapter_shapes(in_features, out_features, num_experts)
    lora_a = torch.zeros(a_shape, device=device, dtype=dtype)
    blocks = lora_a.view(num_experts, config.num_blocks, -1, max(config.ranks), a_shape[2])
    for block, block_rank in enumerate(config.ranks):
        rows = blocks[:, block, :, :block_rank]
        if config.init == "gaussian":
            nn.init.normal_(rows, std=1 / block_rank)
        else:
            bound = 1 / math.sqrt(a_shape[2])
            nn.init.uniform_(rows, -bound, bound)
    return lora_a, torch.zeros(b_shape, device=device, dtype=dtype)
