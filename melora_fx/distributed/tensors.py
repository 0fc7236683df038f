"""Tensors of which each process holds a part: whole ones from them, and parts of whole ones."""

import sys
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .private import shard_size_and_offset


def is_sharded(tensor: Any) -> TypeGuard[Any]:
    """Whether `tensor` is a DTensor, also one of which each process holds all."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has made one has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The values of all processes together, without gradients, on each of them: a collective for a DTensor.

    A tensor that is none comes back as it is.
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.detach().full_tensor()


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`, without gradients; it shares memory with it."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def part_of(values: Tensor, like: Tensor) -> Tensor:
    """The part of `values`, which are whole, that this process holds of `like`: a view; no collective."""
    if not is_sharded(like):
        return values
    size, offset = shard_size_and_offset(like)
    return values[tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))]


def put(tensor: Tensor, values: Tensor) -> None:
    """Writes `values`, which are whole and the same on every process, into `tensor`, of which this one has a part."""
    with torch.no_grad():
        own_part(tensor).copy_(part_of(values, tensor))


def values_at(tensor: Tensor, coordinates: tuple[Tensor, ...]) -> Tensor:
    """The values at some coordinates as float32, on each process; a collective for a DTensor, of these values alone.

    `coordinates`: of each dimension, a vector of integers; those of a DTensor's processes are the same.
    """
    if not is_sharded(tensor):
        return tensor.detach()[coordinates].float()
    from torch.distributed.tensor import DTensor, Partial, Replicate

    size, offset = shard_size_and_offset(tensor)
    local = own_part(tensor)
    inner = [index - start for index, start in zip(coordinates, offset, strict=True)]
    held = torch.ones_like(inner[0], dtype=torch.bool)
    for index, length in zip(inner, size, strict=True):
        held &= (index >= 0) & (index < length)
    values = torch.zeros(len(held), dtype=torch.float32, device=local.device)
    values[held] = local[tuple(index[held] for index in inner)].float()
    kinds = [Replicate() if each.is_replicate() else Partial() for each in tensor.placements]
    bits = values.view(torch.int32)  # whose sum with zeros keeps the sign of a zero
    return DTensor.from_local(bits, tensor.device_mesh, kinds, run_check=False).full_tensor().view(torch.float32)


def broadcast_replicas(tensor: Tensor) -> None:
    """Makes what several processes hold of the same part of `tensor` equal: a collective where there are any."""
    if not is_sharded(tensor) or tensor.is_meta:
        return
    import torch.distributed as dist

    local = own_part(tensor)
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate() and tensor.device_mesh.size(dimension) > 1:
            group = tensor.device_mesh.get_group(dimension)
            with torch.no_grad():
                dist.broadcast(local, dist.get_global_rank(group, 0), group=group)


def as_parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter of `tensor` that is trained if `like` is."""
    return nn.Parameter(tensor, requires_grad=like.requires_grad)
