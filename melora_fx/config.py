"""The adapter's configuration: one small frozen object, validated when it is made.

    W' = W + blockdiag(s_1 B_1 A_1, …, s_n B_n A_n)      A_i: (R_i, I/N)   B_i: (O/N, R_i)
    s_i = alpha_i / R_i        (rank-stabilised: alpha_i / sqrt(R_i))

I in_features, O out_features, N num_blocks, R rank of one block. Source: MELoRA, arXiv 2402.17263, equations 3-5.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn


def _kaiming(rows: torch.Tensor) -> None:
    bound = 1 / math.sqrt(rows.size(-1))
    nn.init.uniform_(rows, -bound, bound)


def _gaussian(rows: torch.Tensor) -> None:
    nn.init.normal_(rows, std=1 / rows.size(-2))


def _orthogonal(rows: torch.Tensor) -> None:
    for matrix in chain.from_iterable(rows):  # (R_i, I/N)
        nn.init.orthogonal_(matrix)


INITS: dict[str, Callable[[torch.Tensor], None]] = {
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
}
"""How A_i starts: fills (E, P, R_i, I/N) in place, the A_i of all E matrices of a stack and P parts of `split`."""
_LARGEST = 1 << 20
"""Of ranks, numbers of blocks, and parts or their sizes."""
_ALPHAS = (1e-30, 1e30)
"""Smallest and largest alpha: its scaling is a number in float32."""
LOWERINGS = ("auto", "weight", "activation", "triton", "plain")


@dataclass(frozen=True)
class MELoRAConfig:
    """How one linear is adapted: `num_blocks` mini LoRAs of `rank` side by side.

    Args:
        rank: rank of one block, or one rank per block. The equivalent rank is their sum (`total_rank`).
        num_blocks: number of diagonal blocks; 1 is ordinary LoRA. Must divide in_features and out_features.
        alpha: numerator of the scaling, or one per block.
        dropout: probability with which an element of the adapter's input is zeroed in training.
        use_rslora: scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
        split: for packed projections, how many equal parts the output has (an int) or their sizes; each part gets
            an adapter of its own, so that no block straddles two of them. None: one adapter for the whole.
        init: distribution of A: "kaiming" (uniform, as nn.Linear), "gaussian" (std 1 / rank) or "orthogonal" (the rows
            of each block orthonormal, its columns where the rank is above I/N; arXiv 2402.16842). B starts at zero.
        lowering: how the adapter is computed in training. "weight": as x (W + Δ)ᵀ where that is the faster form, in
            float32 and without dropout; "activation": added to the output's slices, for every dtype and with dropout;
            "triton": as "activation", on CUDA by Triton kernels, which have not been measured on a GPU yet; "plain":
            as the nodes that the graph shows. "auto" chooses "weight" or "activation" for each site.

    Raises:
        ValueError, TypeError: for a value out of range; the text names the field and its rule.
    """

    rank: int | tuple[int, ...] = 8
    num_blocks: int = 8
    alpha: float | tuple[float, ...] = 16.0
    dropout: float = 0.0
    use_rslora: bool = False
    split: int | tuple[int, ...] | None = None
    init: str = "kaiming"
    lowering: str = "auto"
    ranks: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Rank of each block, N long."""

    def __post_init__(self) -> None:
        _check_int("num_blocks", self.num_blocks)
        for name in ("rank", "alpha"):
            _set(self, name, self._normalised(name))
        _set(self, "ranks", self.rank if isinstance(self.rank, tuple) else (self.rank,) * self.num_blocks)
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float):
            raise TypeError(f"`dropout` must be a number, got {self.dropout!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` (={self.dropout}) must be at least 0 and below 1")
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"`use_rslora` must be a bool, got {self.use_rslora!r}")
        if self.split is not None:
            _set(self, "split", _checked_split(self.split))
        for name, allowed in (("init", INITS), ("lowering", LOWERINGS)):
            if getattr(self, name) not in [*allowed]:  # whatever type it has
                raise ValueError(f"`{name}` (={getattr(self, name)!r}) must be one of {', '.join(map(repr, allowed))}")
        if self.dropout and self.lowering == "weight":
            raise ValueError(f"`dropout` (={self.dropout}) needs `lowering` 'activation' or 'auto', not 'weight'")

    def _normalised(self, name: str) -> Any:
        """`rank` or `alpha`, checked: a number, or a tuple with one number per block."""
        value = getattr(self, name)
        check = _check_int if name == "rank" else _check_positive
        if not isinstance(value, Sequence) or isinstance(value, str):
            check(name, value)
            return value
        if len(value) != self.num_blocks:
            raise ValueError(f"`{name}` lists {len(value)} values for `num_blocks` (={self.num_blocks}): give one each")
        for index, item in enumerate(value):
            check(f"{name}[{index}]", item)
        return tuple(value)

    @property
    def total_rank(self) -> int:
        """The rank of the LoRA whose update has the same rank: the sum over the blocks."""
        return sum(self.ranks)

    @property
    def scalings(self) -> tuple[float, ...]:
        """s_i of each block, N long."""
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * self.num_blocks
        return tuple(
            alpha / (math.sqrt(rank) if self.use_rslora else rank)
            for alpha, rank in zip(alphas, self.ranks, strict=True)
        )

    def parts(self, out_features: int) -> tuple[int, ...]:
        """Sizes of the parts that `split` cuts `out_features` into; one part without `split`."""
        if self.split is None:
            return (out_features,)
        if isinstance(self.split, int):
            return (out_features // self.split,) * self.split
        return self.split

    def adapter_shapes(
        self, in_features: int, out_features: int, num_experts: int = 1
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_a (E·N, P·R, I/N) and lora_b (E·N, O/N, R), R the largest rank of a block, P parts of `split`,
        E num_experts.
        """
        blocks = self.num_blocks
        rank = max(self.ranks)
        num_parts = len(self.parts(out_features))
        lora_a = (num_experts * blocks, num_parts * rank, in_features // blocks)
        lora_b = (num_experts * blocks, out_features // blocks, rank)
        return lora_a, lora_b

    def num_parameters(self, in_features: int, out_features: int) -> int:
        """Number of trainable values of one adapter of this configuration, padding not counted."""
        num_parts = len(self.parts(out_features))
        return self.total_rank * (num_parts * in_features + out_features) // self.num_blocks

    def misfit(self, in_features: int, out_features: int, *, is_head: bool = False) -> str | None:
        """Why a linear of this shape cannot be cut into these blocks, or None when it can; and what to do about it.

        A head has as many outputs as the task wants, and they are no reason for another number of blocks.
        """
        if isinstance(self.split, int) and out_features % self.split:
            return f"`out_features` (={out_features}) must be divisible by `split` (={self.split})"
        if isinstance(self.split, tuple) and sum(self.split) != out_features:
            return f"`split` (={self.split}) must add up to `out_features` (={out_features}), not {sum(self.split)}"
        sizes = {"in_features": in_features, "out_features": out_features}
        if self.split is not None:
            sizes = {"in_features": in_features} | {
                f"split[{index}]": size for index, size in enumerate(self.parts(out_features))
            }
        bad = [f"`{name}` (={size})" for name, size in sizes.items() if size % self.num_blocks]
        if not bad:
            return None
        rule = f"{' and '.join(bad)} must be divisible by `num_blocks` (={self.num_blocks})"
        common = math.gcd(*sizes.values())
        if is_head:
            return f"{rule}: leave it out of `targets`; a head is trained whole, by `keep_trainable`"
        if common == 1:
            return f"{rule}: leave it out of `targets`"
        return f"{rule}; these would do: {', '.join(str(d) for d in range(1, common + 1) if common % d == 0)}"

    def to_dict(self) -> dict[str, Any]:
        """The eight fields as JSON-ready values."""
        values = {name: getattr(self, name) for name, item in self.__dataclass_fields__.items() if item.init}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "MELoRAConfig":
        """The inverse of `to_dict`."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**values)


def alpha_for(scaling: float, rank: int) -> float:
    """The alpha with alpha / rank = scaling in float64, or nearest to it."""
    nearest = scaling * rank
    around = (nearest, math.nextafter(nearest, 0), math.nextafter(nearest, math.inf))
    return next((alpha for alpha in around if alpha / rank == scaling), nearest)


def one_or_each(values: Sequence[Any]) -> Any:
    """A rank or an alpha as a configuration has it: one number where those of all blocks are equal."""
    return values[0] if all(value == values[0] for value in values) else tuple(values)


def _set(config: MELoRAConfig, name: str, value: Any) -> None:
    """Sets a field of the frozen object while it is made."""
    object.__setattr__(config, name, value)


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"`{name}` (={value}) must be at least 1")
    if value > _LARGEST:
        raise ValueError(f"`{name}` must be at most {_LARGEST}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {value!r}")
    if not value > 0:
        raise ValueError(f"`{name}` (={value}) must be positive and finite")
    if not _ALPHAS[0] <= value <= _ALPHAS[1]:
        shown = value if isinstance(value, float) else "an integer"  # which may have more digits than can be shown
        raise ValueError(f"`{name}` (={shown}) must be finite, from {_ALPHAS[0]:g} to {_ALPHAS[1]:g}")


def _checked_split(split: Any) -> int | tuple[int, ...]:
    if isinstance(split, Sequence) and not isinstance(split, str):
        for index, size in enumerate(split):
            _check_int(f"split[{index}]", size)
        if not split:
            raise ValueError("`split` must name at least one part")
        return tuple(split)
    _check_int("split", split)
    return split
