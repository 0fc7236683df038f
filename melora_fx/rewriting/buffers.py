"""Which buffers have changed since `rewrite`: the statistics of a BatchNorm, which no adapter folder holds by itself.

A buffer is known by two sums over its values, which stay as they are when it is moved, copied or loaded again, and
nearly so when it is cast.
"""

from collections.abc import Mapping

import torch
from torch import nn

from melora_fx.names import without_wrappers

Sums = tuple[float, float, float]
"""(sum of the values, sum of their sizes, relative precision of the dtype) of a buffer."""

_LARGEST = torch.finfo(torch.float16).max
"""Values count up to this size: a mask of -inf is the same in every dtype."""

_ROUNDING = 1e-9
"""Of sums in float64 that other devices form in another order."""


def record_buffers(model: nn.Module) -> dict[str, Sums]:
    """By name, what the buffers of floats are recognised by that a `state_dict` holds; nothing of those on meta."""
    return {name: _sums(buffer) for name, buffer in _readable_buffers(model)}


def changed_buffers(model: nn.Module, recorded: Mapping[str, Sums]) -> list[str]:
    """Names of the buffers whose values are other ones than when they were `recorded`."""
    present = record_buffers(model)
    return [name for name, sums in recorded.items() if name in present and _differ(sums, present[name])]


def _readable_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    buffers = [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if type(buffer) is torch.Tensor and buffer.is_floating_point() and not buffer.is_meta
    ]
    saved = model.state_dict(keep_vars=True) if buffers else {}
    return [(without_wrappers(name), buffer) for name, buffer in buffers if name in saved]


def _sums(buffer: torch.Tensor) -> Sums:
    values = buffer.detach().cpu().double().nan_to_num().clamp(-_LARGEST, _LARGEST)
    total, size = torch.stack([values.sum(), values.abs().sum()]).tolist()
    return total, size, torch.finfo(buffer.dtype).eps


def _differ(sums: Sums, others: Sums) -> bool:
    precision = _ROUNDING if sums[2] == others[2] else max(sums[2], others[2])
    bound = precision * max(sums[1], others[1])
    return any(abs(one - other) > bound for one, other in zip(sums[:2], others[:2], strict=True))
