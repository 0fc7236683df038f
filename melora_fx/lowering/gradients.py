"""The gradients of `adapted_linear` from slices: its formulas, and their letters, stand at the top of that file."""

from collections.abc import Sequence

import torch
from torch import Tensor

from melora_fx.adapter.tensors import slices_of

from .slices import Part, cast, few_rows_times


def gradient_by_slices(
    of_y: Tensor,
    weight: Tensor | None,
    like: Tensor,
    mask: Tensor | None,
    parts: Sequence[Part],
    of_hidden: Sequence[Tensor],
) -> Tensor:
    """x' (T, I).

    Args:
        of_y: y' (T, O).
        weight: (O, I), or None where x' is that of the adapter alone.
        like: x (…, I), in the dtype of y'.
        mask: that of the dropout, as x.
        parts: of y'.
        of_hidden: gᵀ (N, R, T) of each part.
    """
    of_x = of_y.new_zeros(len(of_y), like.size(-1)) if weight is None else of_y @ cast(weight, of_y.dtype)
    of_dropped = of_x if mask is None else torch.zeros_like(of_x)
    of_slices = slices_of(of_dropped, len(of_hidden[0]))
    for (_, lora_a, _), of_part in zip(parts, of_hidden, strict=True):
        of_slices.baddbmm_(of_part.mT, lora_a)
    return of_x if mask is None else of_x.addcmul_(of_dropped, mask.view_as(of_x))


def gradients_by_factors(slices: Tensor, part: Part, of_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A' (N, R, I/N), and B' (N, O_p/N, R) without its factor s."""
    columns, lora_a, _ = part
    return torch.bmm(of_hidden, slices), torch.bmm(few_rows_times(lora_a, slices), columns).mT


def gradients_by_blocks(slices: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """The same from G (N, O_p/N, I/N)."""
    columns, lora_a, scaled = part
    of_blocks = torch.bmm(columns.mT, slices)
    return torch.bmm(scaled.mT, of_blocks), torch.bmm(of_blocks, lora_a.mT)
