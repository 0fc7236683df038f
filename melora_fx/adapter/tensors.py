"""Defines an adapter's tensors: their names, shapes and initial values, and the views of a weight that they change.

A stack of E matrices (the experts of a mixture) has the tensors of E adapters one after the other: block i of expert e
is number e·N + i. So an adapter's tensors always have three dimensions, in memory and in files.

N num_blocks, I in_features, O out_features, P parts of `split`, O_p out_features of one part, R the largest rank of a
block.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from melora_fx.config import INITS, MELoRAConfig

FACTORS = ("lora_a", "lora_b")
"""The factors of an update, which are trained. Files store them as `<site>.lora_a` and `<site>.lora_b`."""
SCALING = "lora_scaling"
DROPOUT = "lora_dropout"
TENSORS = (*FACTORS, SCALING, DROPOUT)
"""Names of the attributes that an adapter adds to the module that owns its weight."""


def factor_names(site: str) -> tuple[str, str]:
    """Returns the names of a site's A and B in files, in exported graphs and in `adapter_parameters`."""
    name_a, name_b = FACTORS
    return f"{site}.{name_a}", f"{site}.{name_b}"


@dataclass(frozen=True, eq=False)
class AdapterTensors:
    """A and B of one site, and the configuration that defines their blocks and scalings.

    Attributes:
        config: the site's configuration.
        lora_a: (N, P·R, I/N), or (E·N, P·R, I/N) for a stack; the rows that pad a rank below R are zero.
        lora_b: (N, O/N, R), or (E·N, O/N, R) for a stack.
    """

    config: MELoRAConfig
    lora_a: torch.Tensor
    lora_b: torch.Tensor

    @classmethod
    def new(
        cls,
        config: MELoRAConfig,
        in_features: int,
        out_features: int,
        *,
        num_experts: int = 1,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> "AdapterTensors":
        """Returns fresh tensors: A initialised by `config.init`, B zero."""
        own = cls.zeros(config, in_features, out_features, num_experts=num_experts, device=device, dtype=dtype)
        blocks = own.lora_a.view(num_experts, config.num_blocks, -1, max(config.ranks), own.lora_a.size(2))
        for block, rank in enumerate(config.ranks):
            INITS[config.init](blocks[:, block, :, :rank])
        return own

    @classmethod
    def zeros(
        cls,
        config: MELoRAConfig,
        in_features: int,
        out_features: int,
        *,
        num_experts: int = 1,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> "AdapterTensors":
        """Returns tensors of zeros, which add no update."""
        shapes = config.adapter_shapes(in_features, out_features, num_experts)
        return cls(config, *(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes))

    @classmethod
    def of(cls, site: str, config: MELoRAConfig, tensors: Mapping[str, torch.Tensor]) -> "AdapterTensors":
        """Returns the adapter of `site`, selected from the tensors of many sites; the inverse of `named`."""
        return cls(config, *(tensors[name] for name in factor_names(site)))

    def named(self, site: str) -> dict[str, torch.Tensor]:
        """Returns A and B by their names in files."""
        return dict(zip(factor_names(site), self.factors.values(), strict=True))

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        """A and B by their names in `FACTORS`."""
        return dict(zip(FACTORS, (self.lora_a, self.lora_b), strict=True))

    @property
    def num_experts(self) -> int:
        """E for a stack, 1 for a matrix."""
        return self.lora_a.size(0) // self.config.num_blocks

    @property
    def total_rank(self) -> int:
        """The largest possible rank of the update, summed over all matrices of a stack and all parts of `split`."""
        return self.num_experts * self.config.total_rank * len(self.part_sizes)

    @property
    def in_features(self) -> int:
        """I."""
        return self.config.num_blocks * self.lora_a.size(2)

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """out_features of each part of `split`."""
        return self.config.parts(self.config.num_blocks * self.lora_b.size(1))

    def scaling(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns s_i of each block as (E·N, 1, 1), in `dtype` or the dtype of B. Never sharded, even if B is."""
        like = self.lora_b
        scalings = self.config.scalings * self.num_experts
        return torch.tensor(scalings, dtype=dtype or like.dtype, device=like.device).view(-1, 1, 1)

    def scaled_b(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns s_i B_i, computed in `dtype` or the dtype of B, without gradients."""
        return self.lora_b.detach().to(dtype or self.lora_b.dtype) * self.scaling(dtype)

    def parts(self, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields A (E·N, R, I/N) and s B (E·N, O_p/N, R) of each part p, in `dtype`, without gradients."""
        sizes = [size // self.config.num_blocks for size in self.part_sizes]
        a_parts = self.lora_a.detach().to(dtype).chunk(len(sizes), dim=1)
        yield from zip(a_parts, self.scaled_b(dtype).split(sizes, dim=1), strict=True)

    def by_matrix(self) -> Iterator["AdapterTensors"]:
        """Yields the adapter of each matrix of a stack, as views; yields `self` for a single matrix."""
        number = self.num_experts
        if number == 1:
            yield self
            return
        for lora_a, lora_b in zip(self.lora_a.chunk(number), self.lora_b.chunk(number), strict=True):
            yield AdapterTensors(self.config, lora_a, lora_b)

    def with_rank(self, rank: int) -> "AdapterTensors":
        """Returns copies with another largest rank, padded with zeros or cut, without gradients. If the rank is the
        same, they share the memory of A and B.
        """
        more = rank - self.lora_b.size(2)
        if not more:
            return AdapterTensors(self.config, self.lora_a.detach(), self.lora_b.detach())
        by_part = self.lora_a.detach().unflatten(1, (len(self.part_sizes), -1))
        lora_a = F.pad(by_part, (0, 0, 0, more)).flatten(1, 2)
        return AdapterTensors(self.config, lora_a, F.pad(self.lora_b.detach(), (0, more)))


def slices_of(tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Returns the N equal slices of each of the T rows of (…, I) as (N, T, I/N): a view, if the leading axes can be
    viewed as one.
    """
    features = tensor.size(-1)
    shape = (tensor.numel() // features, num_blocks, features // num_blocks)
    return tensor.reshape(shape).transpose(0, 1)


def diagonal_blocks(weight: torch.Tensor, num_blocks: int, parts: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yields a view (N, O_p/N, I/N) for each part: the blocks of `weight` (O, I) that an adapter changes."""
    row, column = weight.stride()
    offset = weight.storage_offset()
    width = weight.size(1) // num_blocks
    for size in parts:
        height = size // num_blocks
        strides = (height * row + width * column, row, column)
        yield weight.as_strided((num_blocks, height, width), strides, offset)
        offset += size * row


def as_matrices(weight: torch.Tensor, row_dims: int | None) -> torch.Tensor:
    """Returns a view of a weight as the model multiplies by it: a matrix, or a stack of matrices (E, …, …).

    `row_dims`: for a matrix that is stored in three dimensions, such as (I, heads, O / heads), the number of leading
    dimensions that are its rows; None if the weight is already stored as a matrix or a stack.
    """
    return weight if row_dims is None else weight.view(math.prod(weight.shape[:row_dims]), -1)


def matrices(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the matrices of a stack (E, …, …) as views, or the single matrix."""
    return weight.unbind() if weight.dim() == 3 else (weight,)


def num_matrices(weight: torch.Tensor) -> int:
    """Returns E for a stack (E, …, …), 1 for a matrix."""
    return weight.size(0) if weight.dim() == 3 else 1


def features_of(weight: torch.Tensor, *, is_transposed: bool) -> tuple[int, int]:
    """Returns (in_features, out_features) of a weight (O, I), (I, O) if `is_transposed`, or a stack of them."""
    rows, columns = weight.shape[-2:]
    return (rows, columns) if is_transposed else (columns, rows)
