"""The gradients of `adapted_linear`, by the formulas at the top of that file, whose letters these are."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .slices import Part, by_part, cast, slices_of, times_few_rows


class Rows(NamedTuple):
    """What the gradients are computed from, in the dtype of y'.

    y' (T, O); x (…, I) and the dropout's mask, as x; x_i after the dropout (N, T, I/N); y'_i, A and s B of each part.
    """

    of_y: Tensor
    x: Tensor
    mask: Tensor | None
    slices: Tensor
    parts: list[Part]


def rows_of(
    gradient: Tensor, x: Tensor, mask: Tensor | None, lora_a: Tensor, scaled: Tensor, parts: Sequence[int]
) -> Rows:
    """From y' (…, O), x (…, I) in its dtype, A (N, P·R, I/N), s B (N, O/N, R) and the sizes of the parts."""
    of_y = gradient.reshape(-1, gradient.size(-1))
    slices = slices_of(x if mask is None else x * mask, len(lora_a))
    return Rows(of_y, x, mask, slices, by_part(of_y, lora_a, scaled, parts))


def gradients_of_hidden(rows: Rows) -> list[Tensor]:
    """The g (N, T, R) of each part."""
    return [times_few_rows(part.columns, part.scaled.mT) for part in rows.parts]


def gradient_of_x(rows: Rows, weight: Tensor | None, of_hidden: list[Tensor]) -> Tensor:
    """x' (T, I) by slices; without y' W if the weight is None."""
    if weight is None:
        of_x = rows.of_y.new_zeros(len(rows.of_y), rows.x.size(-1))
    else:
        of_x = rows.of_y @ cast(weight, rows.of_y.dtype)
    of_dropped = of_x if rows.mask is None else torch.zeros_like(of_x)
    of_slices = slices_of(of_dropped, len(rows.slices))
    for part, of_part in zip(rows.parts, of_hidden, strict=True):
        of_slices.baddbmm_(of_part, part.lora_a)
    return of_x if rows.mask is None else of_x.addcmul_(of_dropped, rows.mask.view_as(of_x))


def gradients_by_factors(slices: Tensor, part: Part, of_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A' (N, R, I/N) and B' (N, O_p/N, R) over s, of one part."""
    hidden = times_few_rows(slices, part.lora_a)
    return torch.bmm(of_hidden.mT, slices), torch.bmm(hidden.mT, part.columns).mT


def gradients_by_blocks(slices: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """The same from G (N, O_p/N, I/N)."""
    of_blocks = torch.bmm(part.columns.mT, slices)
    return torch.bmm(part.scaled.mT, of_blocks), torch.bmm(of_blocks, part.lora_a.mT)
