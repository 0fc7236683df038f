"""Fingerprints of base weights: the shape, the dtype, and a few values that another base would not have."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from melora_fx.distributed.tensors import is_sharded, values_at

NUM_VALUES = 64
WITHOUT_VALUES = ("quantised", "meta", "imported")
"""The reasons why a fingerprint has no values; `without_values` names one of them instead."""


def fingerprint(weight: torch.Tensor) -> dict[str, Any]:
    """Returns what a base weight is recognised by: its shape, its dtype, and 64 of its values in float32.

    Only these values are gathered from a sharded weight. If they cannot be read, because the weight is quantised or on
    the meta device, the reason takes their place.
    """
    facts: dict[str, Any] = {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    if weight.is_meta:
        return facts | {"without_values": "meta"}
    if (not is_sharded(weight) and type(weight.detach()) is not torch.Tensor) or not weight.is_floating_point():
        return facts | {"without_values": "quantised"}
    return facts | {"values": _sample(weight).tolist()}


def fingerprint_misfit(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Returns why two fingerprints are of different weights, or None. Values may differ by the coarser rounding."""
    shape = list(expected["shape"])
    shapes = [shape]
    if expected.get("without_values") == "imported":  # adapters of other programs do not say the orientation
        shapes.append([*shape[:-2], shape[-1], shape[-2]])
    if list(actual["shape"]) not in shapes:
        return f"its shape is {actual['shape']}, the adapter's base had {expected['shape']}"
    if "values" not in expected or "values" not in actual:
        return None
    if actual["values"] == expected["values"]:
        return None
    limits = [torch.finfo(getattr(torch, facts["dtype"])) for facts in (actual, expected)]
    eps = max(limit.eps for limit in limits)
    tiny = max(limit.smallest_normal for limit in limits)
    values = torch.as_tensor(expected["values"])
    sample = torch.as_tensor(actual["values"])
    is_close = (values - sample).abs() <= eps * values.abs() + tiny
    wrong = int((~is_close).sum())
    return f"{wrong} of {len(values)} sampled values differ from the adapter's base" if wrong else None


CONFIG_FACTS = ("model_type", "tie_word_embeddings")
"""Configuration entries in which checkpoint and model must agree: the model type, and whether its head is tied."""


def layout_sha256(shapes: Mapping[str, Sequence[int]], facts: Mapping[str, Any]) -> str:
    """Returns the SHA-256 that a checkpoint's layout is recognised by.

    Args:
        shapes: the names and shapes of all its tensors, in any order.
        facts: its configuration, of which the values of `CONFIG_FACTS` count; they may be missing.
    """
    layout = [[facts.get(name) for name in CONFIG_FACTS], sorted((name, list(size)) for name, size in shapes.items())]
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


def sampled_positions(numel: int) -> torch.Tensor:
    """Returns the positions of a fingerprint's values in a flattened weight, at even distances."""
    return torch.linspace(0, numel - 1, NUM_VALUES, dtype=torch.float64).long()


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Returns the values of a fingerprint, in float32."""
    index = sampled_positions(weight.numel()).to(weight.device)
    coordinates: list[torch.Tensor] = []
    for size in reversed(weight.shape):  # like `torch.unravel_index`, in a tenth of the time
        coordinates.insert(0, index % size)
        index = index // size
    return values_at(weight, tuple(coordinates)).cpu()
