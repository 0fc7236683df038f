"""The N slices of a row and the parts of `split`: tensors as `bmm` takes them.

I in_features, O out_features, N num_blocks, R the largest rank of a block, T tokens, P parts of O_p columns each.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from melora_fx.adapter.tensors import slices_of

from .cost import WIDE

Part: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Of one part: its columns of the output, or of y', as slices (N, T, O_p/N); A (N, R, I/N); s B (N, O_p/N, R)."""


def own_inputs(x: Tensor, lora_a: Tensor, starts: Sequence[int]) -> Tensor:
    """The features of x (…, I) of which an adapter makes its update, a view; x itself without `starts`."""
    return x.narrow(-1, starts[0], lora_a.size(0) * lora_a.size(2)) if starts else x


def own_outputs(y: Tensor, lora_b: Tensor, starts: Sequence[int]) -> Tensor:
    """The features of y (…, O) to which an adapter adds its update, a view; y itself without `starts`."""
    return y.narrow(-1, starts[1], lora_b.size(0) * lora_b.size(1)) if starts else y


def by_part(output: Tensor, lora_a: Tensor, scaled: Tensor, parts: Sequence[int]) -> list[Part]:
    """The parts of `output` (…, O), and in its dtype those of A (N, P·R, I/N) and of s B (N, O/N, R)."""
    num_blocks = len(lora_a)
    lora_a = cast(lora_a, output.dtype)
    scaled = cast(scaled, output.dtype)
    if len(parts) == 1:
        return [(slices_of(output, num_blocks), lora_a, scaled)]
    columns = output.view(-1, output.size(-1)).split(list(parts), dim=1)
    factors = zip(columns, factors_by_part(lora_a, scaled, parts), strict=True)
    return [(slices_of(of_part, num_blocks), part_a, part_b) for of_part, (part_a, part_b) in factors]


def factors_by_part(lora_a: Tensor, scaled: Tensor, parts: Sequence[int]) -> Sequence[tuple[Tensor, Tensor]]:
    """A (N, R, I/N) and s B (N, O_p/N, R) of each part p."""
    if len(parts) == 1:
        return [(lora_a, scaled)]
    sizes = [size // len(lora_a) for size in parts]
    return list(zip(lora_a.chunk(len(parts), dim=1), scaled.split(sizes, dim=1), strict=True))


def join_parts(parts: list[Tensor]) -> Tensor:
    """The tensor (N, …, …) of which `parts` are pieces along the second axis, contiguous."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)


def few_rows_times(rows: Tensor, slices: Tensor) -> Tensor:
    """A few rows (N, R, K) times the transpose of slices (N, T, K): (N, R, T).

    Each library has its faster order: MKL takes half the time in 32 bits if the few rows come first, and oneDNN four
    times the time in 16 bits (measured).
    """
    if slices.dtype in WIDE:
        return torch.bmm(rows, slices.mT)
    return torch.bmm(slices, rows.mT).mT


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """`tensor.to(dtype)`, or None for None; a call of `to` that changes nothing takes longer than this comparison."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
