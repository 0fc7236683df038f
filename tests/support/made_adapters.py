"""Adapter folders without a model: random updates on made-up base weights, and their float64 values."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from melora_fx import MELoRAConfig
from melora_fx.saving.adapter_file import read_adapter, write_adapter
from melora_fx.saving.fingerprint import fingerprint
from support.models import dense_update, randn

IN, OUT = 24, 36


def made_adapter(
    folder: Path,
    configs: Mapping[str, MELoRAConfig],
    *,
    seed: int = 0,
    base: int = 0,
    num_experts: int = 1,
    dtype: torch.dtype = torch.float32,
    kept: Mapping[str, torch.Tensor] | None = None,
    model: Mapping[str, Any] | None = None,
    entry: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a folder with an adapter of linears (36, 24), or of stacks of them.

    `seed`: for its values; `base`: for the base weights that it belongs to; `kept`: parameters that are trained whole;
    `entry`: changes to each site's entry in the header.
    """
    tensors = dict(kept or {})
    sites = {}
    for index, (name, config) in enumerate(configs.items()):
        a_shape, b_shape = config.adapter_shapes(IN, OUT, num_experts)
        lora_a = randn(*a_shape, seed=10 * seed + index) / math.sqrt(IN)
        lora_b = randn(*b_shape, seed=10 * seed + index + 5) * 0.3
        for block, rank in enumerate(config.ranks * num_experts):
            lora_a[block].unflatten(0, (-1, max(config.ranks)))[:, rank:] = 0
            lora_b[block, :, rank:] = 0
        tensors |= {f"{name}.lora_a": lora_a.to(dtype), f"{name}.lora_b": lora_b.to(dtype)}
        shape = (OUT, IN) if num_experts == 1 else (num_experts, OUT, IN)
        weight = randn(*shape, seed=100 * base + len(name))
        sites[name] = {"config": config.to_dict(), "base": fingerprint(weight), "is_transposed": False, **(entry or {})}
    header = {"sites": sites, "kept": list(kept or {}), "model": dict(model or {"class": "Tower"})}
    write_adapter(folder, tensors, header)
    return folder


def updates_of(folder: Path) -> dict[str, torch.Tensor]:
    """Maps each site to its update (E·O, I) in float64; the matrices of a stack are concatenated."""
    adapter = read_adapter(folder)
    updates = {}
    for name, config in adapter.configs.items():
        own = adapter.tensors_of(name)
        pairs = zip(own.lora_a.chunk(own.num_experts), own.lora_b.chunk(own.num_experts), strict=True)
        updates[name] = torch.cat([dense_update(config, lora_a, lora_b) for lora_a, lora_b in pairs])
    return updates
