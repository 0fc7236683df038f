"""An adapter's updates as ordinary LoRAs, the form that other programs know: Δ = B A, with the scaling in B.

The ranks of one matrix stand part for part of `split`, and in each part block for block: R = P·Σ r_i of them.

N num_blocks, I in_features, O out_features, P parts of `split`, E matrices of a stack.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from melora_fx import MELoRAError
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.saving.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Lora:
    """The update B A of one matrix.

    Attributes:
        lora_a: (R, I).
        lora_b: (O, R), scaled.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B."""
        return self.lora_a, self.lora_b

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_a.size(0)

    def padded(self, rank: int) -> "Lora":
        """The same update with zeros up to another rank."""
        more = rank - self.rank
        return Lora(
            torch.nn.functional.pad(self.lora_a, (0, 0, 0, more)), torch.nn.functional.pad(self.lora_b, (0, more))
        )


def loras_of(own: AdapterTensors) -> list[Lora]:
    """The updates of a site's matrices, one after the other; exact: what a fold adds.

    They have the adapter's dtype, or float32 where s_i B_i is not a number of a narrower one.
    """
    dtype = _exact_dtype(own)
    return [_lora_of(matrix, dtype) for matrix in own.by_matrix()]


def all_loras(adapter: Adapter) -> dict[str, list[Lora]]:
    """Site → `loras_of` it.

    Raises:
        MELoRAError: where a scaling makes a value infinite.
    """
    found = {site: loras_of(adapter.tensors_of(site)) for site in adapter.configs}
    for site, loras in found.items():
        if not all(lora.lora_b.isfinite().all() for lora in loras):
            raise MELoRAError(
                f"`{site}` of `{adapter.directory}`: its values times its scaling are more than its dtype holds: train "
                "with a smaller alpha"
            )
    return found


def _exact_dtype(own: AdapterTensors) -> torch.dtype:
    """The dtype in which s_i B_i is what a fold computes with: the adapter's own, or float32."""
    narrow = torch.promote_types(own.lora_a.dtype, own.lora_b.dtype)
    wide = torch.promote_types(narrow, torch.float32)
    is_exact = torch.equal(own.scaled_b(narrow).to(wide), own.scaled_b(wide))
    return narrow if is_exact else wide


def places(own: AdapterTensors) -> Iterator[tuple[int, int, int, slice]]:
    """Where the ranks of each block stand in a LoRA: part, block, its rank r_i and the r_i ranks, in their order."""
    first = 0
    for part in range(len(own.part_sizes)):
        for block, rank in enumerate(own.config.ranks):
            yield part, block, rank, slice(first, first + rank)
            first += rank


def _lora_of(own: AdapterTensors, dtype: torch.dtype) -> Lora:
    """Of one matrix."""
    width = own.lora_a.size(2)
    in_features, out_features = own.config.num_blocks * width, sum(own.part_sizes)
    lora_a = own.lora_a.new_zeros((own.total_rank, in_features), dtype=dtype)
    lora_b = own.lora_b.new_zeros((out_features, own.total_rank), dtype=dtype)
    parts = list(own.parts(dtype))
    offsets = [sum(own.part_sizes[:part]) for part in range(len(parts))]
    for part, block, rank, ranks in places(own):
        a_blocks, b_blocks = parts[part]
        height = b_blocks.size(1)
        top = offsets[part] + block * height
        lora_a[ranks, block * width : (block + 1) * width] = a_blocks[block, :rank]
        lora_b[top : top + height, ranks] = b_blocks[block, :, :rank]
    return Lora(lora_a, lora_b)
