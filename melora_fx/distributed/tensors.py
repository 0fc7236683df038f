"""Tensors of which each process holds a part: gathers full tensors from them, and takes parts of full tensors."""

import sys
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .private import shard_size_and_offset


def is_sharded(tensor: Any) -> TypeGuard[Any]:
    """Returns whether `tensor` is a DTensor, including a DTensor that is replicated on every process."""
    module = sys.modules.get("torch.distributed.tensor")  # no DTensor can exist before this module is imported
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Returns the full values of a DTensor on every process, without gradients; this is a collective.

    Any other tensor is returned unchanged.
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.detach().full_tensor()


def own_part(tensor: Tensor) -> Tensor:
    """Returns the part of `tensor` that this process holds, without gradients; it shares memory with `tensor`."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def part_of(values: Tensor, like: Tensor) -> Tensor:
    """Returns the part of the full `values` that this process holds of `like`, as a view; not a collective."""
    if not is_sharded(like):
        return values
    size, offset = shard_size_and_offset(like)
    return values[tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))]


def put(tensor: Tensor, values: Tensor) -> None:
    """Writes this process's part of `values`, which are full and equal on every process, into `tensor`."""
    with torch.no_grad():
        own_part(tensor).copy_(part_of(values, tensor))


def values_at(tensor: Tensor, coordinates: tuple[Tensor, ...]) -> Tensor:
    """Returns the values at some coordinates as float32 on every process. A collective for a DTensor; only these values
    are gathered.

    `coordinates`: a vector of integers for each dimension, equal on all processes of a DTensor.
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
    bits = values.view(torch.int32)  # summed as integers, since floats lose the sign of -0 when zeros are added
    return DTensor.from_local(bits, tensor.device_mesh, kinds, run_check=False).full_tensor().view(torch.float32)


def broadcast_replicas(tensor: Tensor) -> None:
    """Makes the copies that several processes hold of one part of `tensor` equal; a collective if there are copies."""
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
    """Returns `tensor` as a parameter with the `requires_grad` of `like`."""
    return nn.Parameter(tensor, requires_grad=like.requires_grad)
