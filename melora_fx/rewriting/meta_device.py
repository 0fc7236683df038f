"""Initialises adapters of modules that were rewritten on the meta device, when their weights leave it.

A move from the meta device allocates memory without values, and a loaded base state contains no adapters.
"""

from collections.abc import Iterable

import torch
from torch import nn

from melora_fx.adapter.site import SiteRecord, owner_of, tensors_of
from melora_fx.adapter.tensors import SCALING, AdapterTensors, features_of, num_matrices
from melora_fx.distributed.placement import laid_as
from melora_fx.distributed.tensors import as_parameter, broadcast_replicas, is_sharded, own_part, put
from melora_fx.patterns.node import weight_of
from melora_fx.torch_private import registered


def on_meta_device(module: nn.Module, records: Iterable[SiteRecord]) -> list[SiteRecord]:
    """Returns the sites of `module` whose adapter is on the meta device."""
    return [record for record in records if tensors_of(module, record).lora_a.is_meta]


def renew_adapters(module: nn.Module, records: Iterable[SiteRecord], moved: Iterable[SiteRecord] = ()) -> None:
    """Initialises the adapters of `module` that have no values yet, and fills its scalings, which are in no state dict.

    Adapters without values are those of `moved` that have left the meta device, and those that are still on it although
    their weight is loaded.
    """
    for record in records:
        lora_a = tensors_of(module, record).lora_a
        weight = weight_of(module, record.parameter)
        if record in moved and not lora_a.is_meta:
            _renew(module, record, weight, lora_a.device)
        elif lora_a.is_meta and not weight.is_meta:
            _renew(module, record, weight, weight.device)
    for record in records:
        _refill_scaling(module, record)


def _renew(module: nn.Module, record: SiteRecord, weight: torch.Tensor, device: torch.device) -> None:
    """Gives the site fresh values on `device`; a sharded site gets its part of them."""
    owner = owner_of(module, record)
    old = tensors_of(module, record)
    matrices = record.matrices_of(weight)
    fresh = AdapterTensors.new(
        record.config,
        *features_of(matrices, is_transposed=record.weight_is_transposed),
        num_experts=num_matrices(matrices),
        device=device,
        dtype=old.lora_a.dtype,
    )
    for kind, tensor in fresh.factors.items():
        present = old.factors[kind]
        if is_sharded(present) and not present.is_meta:  # written in place: the code that shards it holds it too
            put(present, tensor)
            broadcast_replicas(present)
            continue
        laid = laid_as(tensor, present) if is_sharded(present) else tensor
        broadcast_replicas(laid)
        setattr(owner, record.attribute(kind), as_parameter(laid, present))
    record.is_absent = False
    record.saved_config = None


def _refill_scaling(module: nn.Module, record: SiteRecord) -> None:
    adapter = tensors_of(module, record)
    if not adapter.lora_b.numel():  # ZeRO-3 keeps the values elsewhere and does not touch buffers
        return
    _, buffers, _ = registered(owner_of(module, record))
    name = record.attribute(SCALING)
    buffer = buffers[name]
    scaling = adapter.scaling()
    if is_sharded(buffer):
        local = own_part(adapter.lora_b)
        buffers[name] = laid_as(scaling.to(local.device), buffer)
    elif buffer is not None and buffer.device == scaling.device:
        buffer.data.copy_(scaling)
    else:
        buffers[name] = scaling
