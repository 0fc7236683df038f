"""Whether an adapter is whole: its tensors are those that its header describes, no more and no less, and finite.

This is what can be said without a model; `checks` says whether it belongs to one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from melora_fx.adapter.tensors import AdapterTensors, factor_names
from melora_fx.errors import MELoRAError
from melora_fx.matching.keep_trainable import is_within
from melora_fx.names import first_of

from .adapter import Adapter

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
"""Of buffers beside what is trained, such as the counter of a BatchNorm."""


def refuse_malformed(adapter: Adapter) -> None:
    """Raises MELoRAError for an adapter that is not whole; names every tensor at fault."""
    lines = [*_wrong_names(adapter)]
    lines = lines or [*_wrong_sites(adapter), *_wrong_kept(adapter)]
    if lines:
        raise MELoRAError(f"`{adapter.directory}` is no adapter that `save_adapter` writes:\n" + "\n".join(lines))
    refuse_non_finite(adapter)


def refuse_non_finite(adapter: Adapter) -> None:
    """Raises MELoRAError for an adapter that holds NaN or infinity, and names the tensors."""
    if wrong := non_finite_names(adapter.tensors):
        raise MELoRAError(f"`{adapter.directory}` holds NaN or infinity in {', '.join(map(repr, wrong))}")


def non_finite_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, value in tensors.items() if value.is_floating_point() and not _is_finite(value)]


def _is_finite(tensor: torch.Tensor) -> bool:
    """By its extremes, which are NaN where any value is: a pass that writes nothing."""
    return not tensor.numel() or all(math.isfinite(value) for value in torch.aminmax(tensor.detach()))


def _wrong_names(adapter: Adapter) -> Iterator[str]:
    """Lines on tensors that are missing, and on those that nothing in the header accounts for."""
    if not adapter.configs:
        yield "it has no sites"
    own = {name for site in adapter.configs for name in factor_names(site)}
    if missing := sorted(own - adapter.tensors.keys()):
        yield f"it lacks the tensors {_listed(missing)}"
    others = sorted(adapter.tensors.keys() - own)
    if unknown := [name for name in others if not any(is_within(name, kept) for kept in adapter.kept)]:
        yield f"it has tensors of no site, and of nothing that it keeps trainable: {_listed(unknown)}"
    if empty := [kept for kept in adapter.kept if not any(is_within(name, kept) for name in others)]:
        yield f"it lacks all tensors of what it keeps trainable: {_listed(empty)}"


def _wrong_sites(adapter: Adapter) -> Iterator[str]:
    for site in adapter.configs:
        if fault := _fault(adapter.tensors_of(site)):
            yield f"`{site}`: {fault}"


def _fault(own: AdapterTensors) -> str | None:
    """What is wrong with the tensors of a site by themselves, or None."""
    for name, tensor in own.factors.items():
        if tensor.dtype not in FLOATS:
            return f"{name} holds {tensor.dtype}, not floating point numbers"
        if tensor.dim() != 3 or not tensor.numel():
            return f"{name} is {tuple(tensor.shape)}, not of three dimensions"
    config = own.config
    shapes = tuple(own.lora_a.shape), tuple(own.lora_b.shape)
    blocks, _, width = shapes[0]
    in_features, out_features = config.num_blocks * width, config.num_blocks * shapes[1][1]
    fitting = None
    if not blocks % config.num_blocks and config.misfit(in_features, out_features) is None:
        fitting = config.adapter_shapes(in_features, out_features, blocks // config.num_blocks)
    if shapes != fitting:
        return f"lora_a is {shapes[0]} and lora_b {shapes[1]}, which does not fit its configuration {config}"
    if padding_is_used(own):
        return "it holds values beyond the ranks of its blocks"
    return None


def padding_is_used(own: AdapterTensors) -> bool:
    """Whether a block has values beyond its own rank, where it is below the largest one."""
    ranks = own.config.ranks
    if min(ranks) == max(ranks):
        return False
    by_part = own.lora_a.unflatten(1, (len(own.part_sizes), -1))  # (E·N, P, R, I/N)
    return any(
        bool(by_part[block, :, rank:].any() or own.lora_b[block, :, rank:].any())
        for block, rank in enumerate(ranks * own.num_experts)
    )


def _wrong_kept(adapter: Adapter) -> Iterator[str]:
    for name, tensor in adapter.kept_tensors().items():
        if tensor.dtype not in (*FLOATS, *_INTEGERS):
            yield f"`{name}` holds {tensor.dtype}, which no trained module has"


def _listed(names: Sequence[str]) -> str:
    return first_of([*map(repr, names)], 10)
