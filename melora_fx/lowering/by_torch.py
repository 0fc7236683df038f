"""Computes the updates of slices and their gradients for `adapted_linear`, with torch's products.

The formulas and their letters are at the top of `adapted_linear.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from melora_fx.adapter.tensors import slices_of

from .slices import Part, few_rows_times


def add_update(slices: Tensor, parts: Sequence[Part]) -> None:
    """Adds h_i (s_i B_i)ᵀ to the columns of each part in place; `slices` are those of x, (N, T, I/N)."""
    for columns, lora_a, scaled in parts:
        columns.baddbmm_(few_rows_times(lora_a, slices).mT, scaled.mT)


def add_gradients(
    slices: Tensor, parts: Sequence[Part], of_x: Tensor | None, mask: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Returns A' (N, R, I/N) and B' (N, O_p/N, R), without its factor s, of each part, computed by factors.

    Args:
        slices: the slices of the adapter's input, (N, T, I/N).
        parts: the parts of y'.
        of_x: (T, I); g_i A_i is added to its slices in place. None: nothing is added.
        mask: the dropout mask, T·I values of any strides, which multiplies g_i A_i; or None.
    """
    of_hidden = [few_rows_times(scaled.mT, columns) for columns, _, scaled in parts]
    pairs = [
        (torch.bmm(of_h, slices), torch.bmm(few_rows_times(lora_a, slices), columns).mT)
        for (columns, lora_a, _), of_h in zip(parts, of_hidden, strict=True)
    ]
    if of_x is not None:
        of_dropped = of_x if mask is None else torch.zeros_like(of_x)
        of_slices = slices_of(of_dropped, len(slices))
        for (_, lora_a, _), of_h in zip(parts, of_hidden, strict=True):
            of_slices.baddbmm_(of_h.mT, lora_a)
        if mask is not None:
            of_x.addcmul_(of_dropped, mask.reshape(of_x.shape))
    return pairs


def gradients_by_blocks(slices: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Returns A' and B' of one part, as `add_gradients` does, but computed by blocks from G (N, O_p/N, I/N)."""
    columns, lora_a, scaled = part
    of_blocks = torch.bmm(columns.mT, slices)
    return torch.bmm(scaled.mT, of_blocks), torch.bmm(of_blocks, lora_a.mT)
