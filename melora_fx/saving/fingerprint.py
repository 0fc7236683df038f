"""Fingerprints of base weights: shape, dtype and a few values, which another base would not have."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from melora_fx.distributed.tensors import is_sharded, values_at

NUM_VALUES = 64
WITHOUT_VALUES = ("quantised", "meta", "imported")
"""Why a fingerprint has no values: what `without_values` says in its place."""


def fingerprint(weight: torch.Tensor) -> dict[str, Any]:
    """What a base weight is recognised by: its shape, dtype, and 64 of its values in float32; of a sharded one these
    values alone are gathered.

    The values are left out where they cannot be read, and it says why: of a quantised weight, or one on meta.
    """
    facts: dict[str, Any] = {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    if weight.is_meta:
        return facts | {"without_values": "meta"}
    if (not is_sharded(weight) and type(weight.detach()) is not torch.Tensor) or not weight.is_floating_point():
        return facts | {"without_values": "quantised"}
    return facts | {"values": _sample(weight).tolist()}


def fingerprint_misfit(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Why two fingerprints are not of one weight, or None; values may differ by the coarser dtype's rounding."""
    shape = list(expected["shape"])
    shapes = [shape]
    if expected.get("without_values") == "imported":  # which way it lies is not known of another program's adapter
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
"""What a checkpoint's configuration must state as the model's does: which model it is, and whether its head is tied."""


def layout_sha256(shapes: Mapping[str, Sequence[int]], facts: Mapping[str, Any]) -> str:
    """What a checkpoint's layout is recognised by: the names and shapes of all its tensors, in whatever order, and
    what its configuration says of `CONFIG_FACTS`, which may be nothing.
    """
    layout = [[facts.get(name) for name in CONFIG_FACTS], sorted((name, list(size)) for name, size in shapes.items())]
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


def sampled_positions(numel: int) -> torch.Tensor:
    """Where a fingerprint's values stand in a flattened weight: at even distances."""
    return torch.linspace(0, numel - 1, NUM_VALUES, dtype=torch.float64).long()


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """The values of a fingerprint, in float32."""
    index = sampled_positions(weight.numel()).to(weight.device)
    coordinates: list[torch.Tensor] = []
    for size in reversed(weight.shape):  # as `torch.unravel_index`, in a tenth of its time
        coordinates.insert(0, index % size)
        index = index // size
    return values_at(weight, tuple(coordinates)).cpu()
