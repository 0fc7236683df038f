"""Cuts rows into N slices and outputs into the parts of `split`, in the shapes that `bmm` needs.

I in_features, O out_features, N num_blocks, R the largest rank of a block, T tokens, P parts of O_p columns each.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from melora_fx.adapter.tensors import slices_of

from .cost import WIDE

Part: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""One part of `split`: its columns of the output or y' as slices (N, T, O_p/N); A (N, R, I/N); s B (N, O_p/N, R)."""


def own_inputs(x: Tensor, lora_a: Tensor, starts: Sequence[int]) -> Tensor:
    """Returns the features of x (…, I) that an adapter reads, as a view; x itself if `starts` is empty."""
    return x.narrow(-1, starts[0], lora_a.size(0) * lora_a.size(2)) if starts else x


def own_outputs(y: Tensor, lora_b: Tensor, starts: Sequence[int]) -> Tensor:
    """Returns the features of y (…, O) that an adapter adds to, as a view; y itself if `starts` is empty."""
    return y.narrow(-1, starts[1], lora_b.size(0) * lora_b.size(1)) if starts else y


def by_part(output: Tensor, lora_a: Tensor, scaled: Tensor, parts: Sequence[int]) -> list[Part]:
    """Returns the parts of `output` (…, O), A (N, P·R, I/N) and s B (N, O/N, R), with the factors cast to its dtype."""
    num_blocks = len(lora_a)
    lora_a = cast(lora_a, output.dtype)
    scaled = cast(scaled, output.dtype)
    if len(parts) == 1:
        return [(slices_of(output, num_blocks), lora_a, scaled)]
    columns = output.view(-1, output.size(-1)).split(list(parts), dim=1)
    factors = zip(columns, factors_by_part(lora_a, scaled, parts), strict=True)
    return [(slices_of(of_part, num_blocks), part_a, part_b) for of_part, (part_a, part_b) in factors]


def factors_by_part(lora_a: Tensor, scaled: Tensor, parts: Sequence[int]) -> Sequence[tuple[Tensor, Tensor]]:
    """Returns A (N, R, I/N) and s B (N, O_p/N, R) of each part p."""
    if len(parts) == 1:
        return [(lora_a, scaled)]
    sizes = [size // len(lora_a) for size in parts]
    return list(zip(lora_a.chunk(len(parts), dim=1), scaled.split(sizes, dim=1), strict=True))


def join_parts(parts: list[Tensor]) -> Tensor:
    """Joins `parts` along the second axis into one contiguous tensor (N, …, …)."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)


def few_rows_times(rows: Tensor, slices: Tensor) -> Tensor:
    """Multiplies a few rows (N, R, K) by the transpose of slices (N, T, K); returns (N, R, T).

    The faster order depends on the library. With the few rows first, MKL takes half the time in 32 bits, and oneDNN
    takes four times the time in 16 bits (measured).
    """
    if slices.dtype in WIDE:
        return torch.bmm(rows, slices.mT)
    return torch.bmm(slices, rows.mT).mT


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """Returns `tensor.to(dtype)`, or None for None; this comparison is faster than a `to` that changes nothing."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
