"""Converts an adapter's updates to ordinary LoRAs, the form that other programs read: Δ = B A, with the scaling in B.

The R = P·Σ r_i ranks of one matrix are ordered by the parts of `split`, and in each part by the blocks.

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
        lora_a: A (R, I).
        lora_b: B (O, R), which includes the scaling.
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
        """Returns the same update, padded with zeros to a larger rank."""
        more = rank - self.rank
        return Lora(
            torch.nn.functional.pad(self.lora_a, (0, 0, 0, more)), torch.nn.functional.pad(self.lora_b, (0, more))
        )


def loras_of(own: AdapterTensors) -> list[Lora]:
    """Returns the update of each matrix of a site, exactly as a fold adds it.

    The LoRAs have the adapter's dtype, or float32 if a narrower dtype cannot represent s_i B_i exactly.
    """
    dtype = _exact_dtype(own)
    return [_lora_of(matrix, dtype) for matrix in own.by_matrix()]


def all_loras(adapter: Adapter) -> dict[str, list[Lora]]:
    """Maps each site to its `loras_of`.

    Raises:
        MELoRAError: if a scaling makes a value infinite.
    """
    found = {site: loras_of(adapter.tensors_of(site)) for site in adapter.configs}
    for site, loras in found.items():
        if not all(lora.lora_b.isfinite().all() for lora in loras):
            raise MELoRAError(
                f"`{site}` of `{adapter.directory}`: its values times its scaling exceed the range of its dtype: train "
                "with a smaller alpha"
            )
    return found


def _exact_dtype(own: AdapterTensors) -> torch.dtype:
    """Returns the dtype in which s_i B_i is exact, as a fold uses it: the adapter's own, or float32."""
    narrow = torch.promote_types(own.lora_a.dtype, own.lora_b.dtype)
    wide = torch.promote_types(narrow, torch.float32)
    is_exact = torch.equal(own.scaled_b(narrow).to(wide), own.scaled_b(wide))
    return narrow if is_exact else wide


def places(own: AdapterTensors) -> Iterator[tuple[int, int, int, slice]]:
    """Yields the place of each block in a LoRA, in order: part, block, its rank r_i and the slice of its r_i ranks."""
    first = 0
    for part in range(len(own.part_sizes)):
        for block, rank in enumerate(own.config.ranks):
            yield part, block, rank, slice(first, first + rank)
            first += rank


def _lora_of(own: AdapterTensors, dtype: torch.dtype) -> Lora:
    """Returns the LoRA of one matrix."""
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
