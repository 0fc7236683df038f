"""Finds the blocks of ordinary LoRAs whose values lie in blocks: the inverse of `lora_form`.

N num_blocks, I in_features, O out_features, R ranks of one matrix, P parts of `split`, E matrices of a stack.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.config import MELoRAConfig, alpha_for, one_or_each

from .lora_form import Lora, loras_of, places

_MOST_PARTS = 8
"""The largest number of parts that is tried for a packed projection whose number of parts is not known."""


@dataclass(frozen=True)
class _Rank:
    """The place of one rank of a LoRA: the part and the block that contain all of its values."""

    part: int
    block: int


def in_blocks(loras: Sequence[Lora], scaling: float) -> AdapterTensors | None:
    """Returns the blocks that the LoRAs of a site consist of, as many as possible, or None if there is only one.

    Every block of every part must have at least one rank: a LoRA that changes only a corner of a weight has no blocks.
    Ranks without values are left out.

    Args:
        loras: the LoRA of each matrix of a stack, or of the one matrix.
        scaling: the factor of B A.
    """
    spans_a = _spans(torch.stack([lora.lora_a for lora in loras]).ne(0).any(0))
    spans_b = _spans(torch.stack([lora.lora_b for lora in loras]).ne(0).any(0).T)
    sizes = loras[0].lora_a.size(1), loras[0].lora_b.size(0)
    common = math.gcd(*sizes)
    for num_blocks in (number for number in range(common, 1, -1) if common % number == 0):
        for num_parts in _numbers_of_parts(sizes[1], num_blocks):
            ranks = _place(spans_a, spans_b, sizes, num_blocks, num_parts)
            if ranks is not None:
                return _cut(loras, ranks, num_blocks, num_parts, scaling)
    return None


def as_described(
    loras: Sequence[Lora], config: MELoRAConfig, order: Callable[[AdapterTensors], list[list[int]]] | None = None
) -> AdapterTensors | None:
    """Returns the blocks of LoRAs that were written from this configuration, or None if the values contradict it.

    Args:
        loras: the LoRA of each matrix of a stack, or of the one matrix; values beyond the configuration's ranks must
            be zero.
        config: the configuration, with scalings of 1.
        order: returns the ranks at each place, in the order of `places`; by default the order of `loras_of`.
    """
    in_features, out_features = loras[0].lora_a.size(1), loras[0].lora_b.size(0)
    if config.misfit(in_features, out_features) or loras[0].rank < config.total_rank * len(config.parts(out_features)):
        return None
    own = AdapterTensors.zeros(config, in_features, out_features, num_experts=len(loras), dtype=_dtype(loras))
    for matrix, lora in zip(own.by_matrix(), loras, strict=True):
        indices = (order or _ranks_in_order)(matrix)
        flat = [index for ranks in indices for index in ranks]
        if max(flat) >= lora.rank:
            return None
        _fill(matrix, lora, indices)
        (made,) = loras_of(matrix)
        others = [index for index in range(lora.rank) if index not in {*flat}]
        is_same = torch.equal(made.lora_a, lora.lora_a[flat]) and torch.equal(made.lora_b, lora.lora_b[:, flat])
        if not is_same or lora.lora_a[others].any() or lora.lora_b[:, others].any():
            return None
    return own


def _ranks_in_order(own: AdapterTensors) -> list[list[int]]:
    """Returns the ranks at each of `places`, in the order of `loras_of`."""
    return [list(range(ranks.start, ranks.stop)) for _, _, _, ranks in places(own)]


def _dtype(loras: Sequence[Lora]) -> torch.dtype:
    """Returns a dtype that can represent both A and B."""
    return torch.promote_types(loras[0].lora_a.dtype, loras[0].lora_b.dtype)


def _spans(used: torch.Tensor) -> list[tuple[int, int] | None]:
    """Returns the first and last column with a value for each row, or None for a row without values."""
    columns = torch.arange(used.size(1))
    last = torch.where(used, columns, -1).amax(1).tolist()
    first = torch.where(used, columns, used.size(1)).amin(1).tolist()
    return [(low, high) if high >= 0 else None for low, high in zip(first, last, strict=True)]


def _numbers_of_parts(out_features: int, num_blocks: int) -> Iterable[int]:
    return (number for number in range(1, _MOST_PARTS + 1) if out_features % (number * num_blocks) == 0)


def _place(
    spans_a: Sequence[tuple[int, int] | None],
    spans_b: Sequence[tuple[int, int] | None],
    sizes: tuple[int, int],
    num_blocks: int,
    num_parts: int,
) -> list[_Rank | None] | None:
    """Returns the part and block of each rank, which is None for a rank without values.

    Returns None instead if a rank fits into no block, or a block has no rank. `sizes`: I and O.
    """
    width, height = sizes[0] // num_blocks, sizes[1] // (num_blocks * num_parts)
    found: list[_Rank | None] = []
    for span_a, span_b in zip(spans_a, spans_b, strict=True):
        columns, rows = _piece(span_a, width), _piece(span_b, height)
        if columns == -1 or rows == -1 or (num_parts > 1 and (columns is None) != (rows is None)):
            return None
        if rows is not None and columns not in (None, rows % num_blocks):
            return None
        if rows is not None:
            found.append(_Rank(rows // num_blocks, rows % num_blocks))
        else:
            found.append(None if columns is None else _Rank(0, columns))
    number = len({rank for rank in found if rank is not None})
    return found if number == num_blocks * num_parts else None


def _piece(span: tuple[int, int] | None, size: int) -> int | None:
    """Returns the index of the piece of `size` that contains a span; -1 for several pieces, None for no values."""
    if span is None:
        return None
    return span[0] // size if span[0] // size == span[1] // size else -1


def _cut(
    loras: Sequence[Lora], ranks: Sequence[_Rank | None], num_blocks: int, num_parts: int, scaling: float
) -> AdapterTensors:
    """Returns the tensors of these blocks. The parts of a block share its rank, the largest of a part."""
    by_place: dict[_Rank, list[int]] = {}
    for index, rank in enumerate(ranks):
        if rank is not None:
            by_place.setdefault(rank, []).append(index)
    most = tuple(max(len(by_place[_Rank(part, block)]) for part in range(num_parts)) for block in range(num_blocks))
    config = MELoRAConfig(
        rank=one_or_each(most),
        num_blocks=num_blocks,
        alpha=one_or_each([alpha_for(scaling, rank) for rank in most]),
        split=None if num_parts == 1 else num_parts,
    )
    in_features, out_features = loras[0].lora_a.size(1), loras[0].lora_b.size(0)
    own = AdapterTensors.zeros(config, in_features, out_features, num_experts=len(loras), dtype=_dtype(loras))
    for matrix, lora in zip(own.by_matrix(), loras, strict=True):
        _fill(matrix, lora, [by_place[_Rank(part, block)] for part, block, _, _ in places(matrix)])
    return own


def _fill(own: AdapterTensors, lora: Lora, indices: Sequence[list[int]]) -> None:
    """Writes a LoRA's values into the blocks of one matrix; `indices`: its ranks at each of `places`."""
    width, largest = own.lora_a.size(2), own.lora_b.size(2)
    heights = [size // own.config.num_blocks for size in own.part_sizes]
    for (part, block, _, _), index in zip(places(own), indices, strict=True):
        columns = lora.lora_a[index, block * width : (block + 1) * width]
        own.lora_a[block, part * largest : part * largest + len(columns)] = columns
        top = sum(own.part_sizes[:part]) + block * heights[part]
        rows = lora.lora_b[top : top + heights[part], index]
        first = sum(heights[:part])
        own.lora_b[block, first : first + heights[part], : rows.size(1)] = rows
