"""PEFT's block-diagonal LoRA: one factor of a linear stored in blocks, the other written out.

A in blocks is (r, I/n) and B in blocks (O, r/n), the blocks one below the other; a block has r/n ranks. PEFT has lists
of names for the linears of each kind, which match any part of a module's full name, and one number of blocks for all.
Source: PEFT 0.21, `tuners/lora/variants.py` (BdLoraLinearVariant).

n blocks, I in_features, O out_features, r rank.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from exporters.adapters.lora_form import Lora, places
from melora_fx import MELoRAError
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.saving.adapter import Adapter

from .stacks import is_stack

LISTS = {"a": "target_modules_bd_a", "b": "target_modules_bd_b"}


@dataclass(frozen=True)
class Packing:
    """The factor of each module that is stored in blocks.

    Attributes:
        num_blocks: n.
        factors: name of a module → the factor, "a" or "b".
        is_strict: whether `factors` names every module.
        block_rank: the smallest r/n that fits all packed sites.
    """

    num_blocks: int
    factors: Mapping[str, str]
    is_strict: bool
    block_rank: int = 1

    def rank_for(self, rank: int) -> int:
        """Returns the smallest r that fits `rank` and every packed site."""
        return self.num_blocks * max(self.block_rank, -(-rank // self.num_blocks))

    def factor_of(self, module: str) -> str | None:
        """Returns the factor of a module that PEFT would read as blocks, or None."""
        return next((factor for pattern, factor in self.factors.items() if pattern in module), None)

    def to_dict(self) -> dict[str, Any]:
        """Returns PEFT's `use_bdlora`."""
        lists = {key: [name for name, own in self.factors.items() if own == factor] for factor, key in LISTS.items()}
        return lists | {"nblocks": self.num_blocks, "match_strict": self.is_strict}


def choose_packing(adapter: Adapter) -> Packing:
    """Returns the packing that saves the most values.

    Raises:
        MELoRAError: if PEFT can store no site in blocks, or the adapter has stacks of experts.
    """
    if stacks := [site for site in adapter.configs if is_stack(adapter, site)]:
        raise MELoRAError(
            f"`{adapter.directory}` adapts stacks of experts (`{stacks[0]}`), which PEFT does not combine with "
            'block-diagonal LoRA: write it with form="lora"'
        )
    best: dict[str, str] = {}
    num_blocks = 1
    for number in sorted({config.num_blocks for config in adapter.configs.values()} - {1}):
        fitting = {site: _larger(adapter.tensors_of(site)) for site in adapter.configs if _fits(adapter, site, number)}
        factors = _without_conflicts(fitting, adapter.configs)
        if _saved(adapter, number, factors) > _saved(adapter, num_blocks, best):
            num_blocks, best = number, factors
    if not best:
        raise MELoRAError(
            f"`{adapter.directory}` has no site that PEFT's block-diagonal LoRA can store in blocks: it needs an "
            'nn.Linear with `num_blocks` above 1; write it with form="lora"'
        )
    block_rank = max(adapter.tensors_of(site).lora_a.size(1) for site in best)
    return Packing(num_blocks, best, is_strict=best.keys() == adapter.configs.keys(), block_rank=block_rank)


def packed(packing: Packing, site: str, own: AdapterTensors, dense: Lora) -> Lora:
    """Returns a site's factors as the packing stores them, with the rank of `dense`; `dense` if it stores no blocks."""
    factor = packing.factor_of(site)
    if factor is None:
        return dense
    dtype = dense.lora_b.dtype
    number, rank = own.config.num_blocks, dense.rank
    lora_a = own.lora_a.to(dtype)
    lora_a = torch.nn.functional.pad(lora_a, (0, 0, 0, rank // number - lora_a.size(1)))  # (n, r/n, I/n)
    lora_b = own.lora_b.new_zeros((number, own.lora_b.size(1), rank // number), dtype=dtype)
    first, row = 0, 0
    for a_part, b_part in own.parts(dtype):  # (n, R, I/n), (n, O_p/n, R)
        lora_b[:, row : row + b_part.size(1), first : first + a_part.size(1)] = b_part
        first += a_part.size(1)
        row += b_part.size(1)
    if factor == "a":
        return Lora(lora_a.flatten(0, 1), _written_out(own, lora_b))
    return Lora(torch.block_diag(*lora_a), lora_b.flatten(0, 1))


def packed_ranks(own: AdapterTensors, block_rank: int) -> list[list[int]]:
    """Returns the ranks at each of `lora_form.places`, in a site that `packed` stored in blocks of `block_rank`."""
    largest = own.lora_b.size(2)
    firsts = [(block * block_rank + part * largest, rank) for part, block, rank, _ in places(own)]
    return [list(range(first, first + rank)) for first, rank in firsts]


def unpacked(weight: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Returns a factor in blocks, one below the other, as a block-diagonal matrix."""
    return torch.block_diag(*weight.chunk(num_blocks))


def _written_out(own: AdapterTensors, lora_b: torch.Tensor) -> torch.Tensor:
    """Returns B (O, r) from blocks (n, O/n, r/n), whose rows are ordered by part."""
    number, block_rank = own.config.num_blocks, lora_b.size(2)
    whole = lora_b.new_zeros((sum(own.part_sizes), number * block_rank))
    top, first = 0, 0
    for size in own.part_sizes:
        height = size // number
        for block in range(number):
            rows = slice(top + block * height, top + (block + 1) * height)
            whole[rows, block * block_rank : (block + 1) * block_rank] = lora_b[block, first : first + height]
        top, first = top + size, first + height
    return whole


def _fits(adapter: Adapter, site: str, num_blocks: int) -> bool:
    own = adapter.tensors_of(site)
    return own.config.num_blocks == num_blocks and not adapter.transposed.get(site)


def _larger(own: AdapterTensors) -> str:
    """Returns the factor with more values, but A if there is a `split`: B's blocks need consecutive rows."""
    is_wide = own.lora_b.size(1) > own.lora_a.size(2)
    return "b" if is_wide and own.config.split is None else "a"


def _without_conflicts(factors: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    """Drops the sites whose name is part of the name of a module with another factor: PEFT would match that one too."""
    while True:
        wrong = {
            pattern
            for name in names
            for pattern in factors
            if pattern in name and factors.get(name) != factors[pattern]
        }
        if not wrong:
            return factors
        factors = {name: factor for name, factor in factors.items() if name not in wrong}


def _saved(adapter: Adapter, num_blocks: int, factors: Mapping[str, str]) -> int:
    """Returns roughly how many values the packing saves."""
    saved = 0
    for site in adapter.configs:
        if factor := factors.get(site):
            own = adapter.tensors_of(site)
            features = own.lora_a.size(2) if factor == "a" else own.lora_b.size(1)
            saved += own.total_rank * features * (num_blocks - 1)
    return saved
