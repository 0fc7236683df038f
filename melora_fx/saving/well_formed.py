"""Checks that an adapter is well formed: its tensors are exactly those that its header describes, and are finite.

These checks need no model; `checks` checks that an adapter belongs to a model.
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
"""Dtypes of buffers that are saved with trained modules, such as the counter of a BatchNorm."""


def refuse_malformed(adapter: Adapter) -> None:
    """Raises MELoRAError if the adapter is malformed, and names every tensor at fault."""
    lines = [*_wrong_names(adapter)]
    lines = lines or [*_wrong_sites(adapter), *_wrong_kept(adapter)]
    if lines:
        raise MELoRAError(f"`{adapter.directory}` is not an adapter as `save_adapter` writes it:\n" + "\n".join(lines))
    refuse_non_finite(adapter)


def refuse_non_finite(adapter: Adapter) -> None:
    """Raises MELoRAError if the adapter contains NaN or infinity, and names the tensors."""
    if wrong := non_finite_names(adapter.tensors):
        raise MELoRAError(f"`{adapter.directory}` holds NaN or infinity in {', '.join(map(repr, wrong))}")


def non_finite_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns the names of the tensors that contain NaN or infinity."""
    return [name for name, value in tensors.items() if value.is_floating_point() and not _is_finite(value)]


def _is_finite(tensor: torch.Tensor) -> bool:
    """Uses the extremes, which are NaN if any value is NaN, so the pass allocates nothing."""
    return not tensor.numel() or all(math.isfinite(value) for value in torch.aminmax(tensor.detach()))


def _wrong_names(adapter: Adapter) -> Iterator[str]:
    """Yields a line for each kind of fault: missing tensors, and tensors that the header does not account for."""
    if not adapter.configs:
        yield "it has no sites"
    own = {name for site in adapter.configs for name in factor_names(site)}
    if missing := sorted(own - adapter.tensors.keys()):
        yield f"it lacks the tensors {_listed(missing)}"
    others = sorted(adapter.tensors.keys() - own)
    if unknown := [name for name in others if not any(is_within(name, kept) for kept in adapter.kept)]:
        yield f"it has tensors of no site and of no module or parameter kept trainable: {_listed(unknown)}"
    if empty := [kept for kept in adapter.kept if not any(is_within(name, kept) for name in others)]:
        yield f"it lacks all tensors of modules or parameters kept trainable: {_listed(empty)}"


def _wrong_sites(adapter: Adapter) -> Iterator[str]:
    for site in adapter.configs:
        if fault := _fault(adapter.tensors_of(site)):
            yield f"`{site}`: {fault}"


def _fault(own: AdapterTensors) -> str | None:
    """Returns the fault of a site's tensors, checked without a model, or None."""
    for name, tensor in own.factors.items():
        if tensor.dtype not in FLOATS:
            return f"{name} holds {tensor.dtype}, not floating point numbers"
        if tensor.dim() != 3 or not tensor.numel():
            return f"{name} is {tuple(tensor.shape)}, but must have three dimensions and at least one value"
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
    """Returns whether a block has values beyond its rank, if that is below the largest rank."""
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
