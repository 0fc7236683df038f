"""Stacks of expert matrices in PEFT's folders: their keys, and the layout of the experts.

Stacks are parameters, and PEFT wraps their module once for each of them, the first parameter innermost: with two,
`experts.base_layer.lora_A` belongs to the first and `experts.lora_A` to the second. A is (E·r, I), expert by expert; B
is (O, r·E), with the experts side by side for each rank. Source: PEFT 0.21, `tuners/lora/layer.py` (ParamWrapper).

E experts, I in_features, O out_features, r rank of one expert.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from exporters.adapters.lora_form import Lora
from melora_fx.saving.adapter import Adapter

from .names import BASE_LAYER

_NAMES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""Names of stacks, in the order of the parameters in transformers' modules."""


class StackKey(NamedTuple):
    """One stack of a module: the parameter's name, and the path of PEFT's wrapper around it."""

    parameter: str
    wrapper: str


def is_parameter(adapter: Adapter, site: str) -> bool:
    """Returns whether PEFT needs `target_parameters` for a site: a stack, or a matrix that is not called `weight`."""
    return site in adapter.parameters or is_stack(adapter, site)


def is_stack(adapter: Adapter, site: str) -> bool:
    """Returns whether a site is a stack of matrices."""
    shape = adapter.fingerprints.get(site, {}).get("shape", ())
    return adapter.tensors_of(site).num_experts > 1 or (len(shape) == 3 and site not in adapter.row_dims)


def by_module(parameters: Iterable[str]) -> Mapping[str, list[str]]:
    """Maps each module to the names of its parameters among these paths."""
    found: dict[str, list[str]] = {}
    for path in parameters:
        module, _, name = path.rpartition(".")
        found.setdefault(module, []).append(name)
    return found


def nested(module: str, parameters: Iterable[str]) -> list[StackKey]:
    """Returns the wrappers around a module whose `parameters` are adapted.

    Raises:
        ValueError: if the order of the parameters is not known.
    """
    names = list(parameters)
    if len(names) > 1:
        if unknown := [name for name in names if name not in _NAMES]:
            raise ValueError(f"`{module}` has several stacks, whose order is known only for {_NAMES}, not {unknown}")
        names.sort(key=_NAMES.index)
    return [StackKey(name, module + BASE_LAYER * (len(names) - 1 - index)) for index, name in enumerate(names)]


def stack_at(wrapper: str, wrappers: Collection[str], target_parameters: Iterable[str]) -> str | None:
    """Returns the path of the parameter that a wrapper adapts, or None if it adapts a module.

    Args:
        wrapper: the path of the wrapper.
        wrappers: all paths that have A and B.
        target_parameters: paths of the stacks, or the ends of their paths.

    Raises:
        ValueError: if the wrappers of the module are not those of the stacks.
    """
    module = wrapper
    while module.endswith(BASE_LAYER):
        module = module.removesuffix(BASE_LAYER)
    ends = [parameter.rpartition(".") for parameter in target_parameters]
    names = sorted({name for owner, _, name in ends if not owner or f".{module}".endswith(f".{owner}")})
    if not names:
        return None
    found = {key.wrapper: f"{module}.{key.parameter}" for key in nested(module, names)}
    there = {path for path in wrappers if re.fullmatch(rf"{re.escape(module)}({re.escape(BASE_LAYER)})*", path)}
    if found.keys() != there:
        raise ValueError(
            f"it has lora_A and lora_B for {sorted(there)}, but its `target_parameters` need {sorted(found)}"
        )
    return found[wrapper]


def stacked(loras: Sequence[Lora], lies_transposed: bool | None = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A (E·r, I) and B (O, r·E) of the experts' LoRAs.

    For one matrix that `lies_transposed`, returns Bᵀ and Aᵀ, because PEFT treats the matrix as (O, I).
    """
    if lies_transposed:
        return loras[0].lora_b.T.contiguous(), loras[0].lora_a.T.contiguous()
    lora_b = torch.stack([lora.lora_b for lora in loras], dim=-1).flatten(1)
    return torch.cat([lora.lora_a for lora in loras]), lora_b


def unstacked(lora_a: torch.Tensor, lora_b: torch.Tensor, rank: int) -> list[Lora]:
    """Returns the experts' LoRAs from A (E·r, I) and B (O, r·E): the inverse of `stacked`.

    Raises:
        ValueError: if the shapes are not those of experts with this rank.
    """
    ranks = lora_a.size(0)
    if ranks % rank or lora_b.size(1) != ranks:
        raise ValueError(f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)} are not shapes of experts with rank {rank}")
    by_expert = lora_b.unflatten(1, (rank, ranks // rank)).unbind(2)
    return [Lora(a, b.contiguous()) for a, b in zip(lora_a.split(rank), by_expert, strict=True)]
