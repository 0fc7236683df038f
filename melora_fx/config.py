"""Holds the configuration of an adapter: one small frozen object, validated when it is created.

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
"""Initialisers of A by name. Each fills a tensor (E, P, R_i, I/N) in place: the A_i of one block i, for all E matrices
of a stack and all P parts of `split`."""
_LARGEST = 1 << 20
"""Largest value of a rank, of `num_blocks`, and of the number and the size of the parts in `split`."""
_ALPHAS = (1e-30, 1e30)
"""Smallest and largest alpha. In this range every scaling is finite and above zero in float32."""
LOWERINGS = ("auto", "weight", "activation", "triton", "plain")


@dataclass(frozen=True)
class MELoRAConfig:
    """The configuration of one linear's adapter: `num_blocks` mini LoRAs of rank `rank`, side by side.

    Args:
        rank: rank of one block, or one rank per block. The equivalent rank is the sum over the blocks (`total_rank`).
        num_blocks: number of diagonal blocks; 1 is ordinary LoRA. Must divide in_features and out_features, and with
            `split` the size of each part.
        alpha: numerator of the scaling, or one per block.
        dropout: probability that an element of the adapter's input is zeroed in training.
        use_rslora: scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
        split: for packed projections: the number of equal parts of the output (an int), or their sizes. Each part gets
            its own adapter, so no block straddles two parts. None: one adapter for the whole output.
        init: distribution of A: "kaiming" (uniform, as in nn.Linear), "gaussian" (std 1 / rank) or "orthogonal" (the
            rows of each block are orthonormal, or its columns if the rank is above I/N; arXiv 2402.16842). B starts at
            zero.
        lowering: how the adapter is computed in training. "weight": as x (W + Δ)ᵀ if that form is faster, in float32
            or float64 and without dropout; "activation": added to the slices of the output, for every dtype and with
            dropout; "triton": as "activation", on CUDA with Triton kernels, which have not been measured on a GPU yet;
            "plain": as the nodes that the graph shows. "auto" chooses "weight", "activation" or "plain" for each site:
            the first that supports it.

    Raises:
        ValueError: if a value is out of range. The text names the field and its rule.
        TypeError: if a field other than `init` and `lowering` has the wrong type. The text names the field and its
            rule.
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
    """Rank of each block, a tuple of length N."""

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
            if getattr(self, name) not in [*allowed]:  # a list, as the value may not be hashable
                raise ValueError(f"`{name}` (={getattr(self, name)!r}) must be one of {', '.join(map(repr, allowed))}")
        if self.dropout and self.lowering == "weight":
            raise ValueError(f"`dropout` (={self.dropout}) excludes `lowering` 'weight': use 'activation' or 'auto'")

    def _normalised(self, name: str) -> Any:
        """Returns `rank` or `alpha` after checking it: a number, or a tuple with one number per block."""
        value = getattr(self, name)
        check = _check_int if name == "rank" else _check_positive
        if not isinstance(value, Sequence) or isinstance(value, str):
            check(name, value)
            return value
        if len(value) != self.num_blocks:
            raise ValueError(
                f"`{name}` lists {len(value)} values for `num_blocks` (={self.num_blocks}): list one per block"
            )
        for index, item in enumerate(value):
            check(f"{name}[{index}]", item)
        return tuple(value)

    @property
    def total_rank(self) -> int:
        """The rank of a LoRA whose update has the same rank: the sum over the blocks."""
        return sum(self.ranks)

    @property
    def scalings(self) -> tuple[float, ...]:
        """s_i of each block, a tuple of length N."""
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * self.num_blocks
        return tuple(
            alpha / (math.sqrt(rank) if self.use_rslora else rank)
            for alpha, rank in zip(alphas, self.ranks, strict=True)
        )

    def parts(self, out_features: int) -> tuple[int, ...]:
        """Returns the sizes of the parts that `split` cuts `out_features` outputs into; without `split`, one part."""
        if self.split is None:
            return (out_features,)
        if isinstance(self.split, int):
            return (out_features // self.split,) * self.split
        return self.split

    def adapter_shapes(
        self, in_features: int, out_features: int, num_experts: int = 1
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of lora_a, (E·N, P·R, I/N), and lora_b, (E·N, O/N, R).

        R is the largest rank of a block, and P the number of parts of `split`.

        Args:
            in_features: I, of one linear.
            out_features: O, of one linear.
            num_experts: E, the number of linears in a stack.
        """
        blocks = self.num_blocks
        rank = max(self.ranks)
        num_parts = len(self.parts(out_features))
        lora_a = (num_experts * blocks, num_parts * rank, in_features // blocks)
        lora_b = (num_experts * blocks, out_features // blocks, rank)
        return lora_a, lora_b

    def num_parameters(self, in_features: int, out_features: int) -> int:
        """Returns the number of trainable values of one adapter on a linear of this shape, without padding."""
        num_parts = len(self.parts(out_features))
        return self.total_rank * (num_parts * in_features + out_features) // self.num_blocks

    def misfit(self, in_features: int, out_features: int, *, is_head: bool = False) -> str | None:
        """Returns why a linear of this shape cannot be cut into these blocks, and the remedy; None if it can.

        Args:
            in_features: number of inputs of the linear.
            out_features: number of its outputs.
            is_head: whether the linear is a head. The task decides how many outputs a head has, so the remedy is then
                never another number of blocks.
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
            return f"{rule}: leave it out of `targets`, and train the head whole with `keep_trainable`"
        if common == 1:
            return f"{rule}: leave it out of `targets`"
        return f"{rule}; these would do: {', '.join(str(d) for d in range(1, common + 1) if common % d == 0)}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the eight fields as JSON-ready values."""
        values = {name: getattr(self, name) for name, item in self.__dataclass_fields__.items() if item.init}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "MELoRAConfig":
        """Returns the configuration with these fields; the inverse of `to_dict`.

        Raises:
            ValueError, TypeError: if a field is unknown, or its value is out of range.
        """
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**values)


def alpha_for(scaling: float, rank: int) -> float:
    """Returns an alpha with alpha / rank = scaling in float64, or scaling * rank if no neighbouring float has it."""
    nearest = scaling * rank
    around = (nearest, math.nextafter(nearest, 0), math.nextafter(nearest, math.inf))
    return next((alpha for alpha in around if alpha / rank == scaling), nearest)


def one_or_each(values: Sequence[Any]) -> Any:
    """Returns the ranks or alphas of all blocks as a configuration stores them: one number if all are equal."""
    return values[0] if all(value == values[0] for value in values) else tuple(values)


def _set(config: MELoRAConfig, name: str, value: Any) -> None:
    """Sets a field of the frozen object during its construction."""
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
        shown = value if isinstance(value, float) else "an integer"  # may have more digits than Python prints
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
