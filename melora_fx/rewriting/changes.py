"""What has changed since `rewrite` of what it froze: the statistics of a BatchNorm, a bias that was trained meanwhile.

No adapter folder holds it. A tensor is known by two sums over its values, of the larger ones over a sample: they stay
as they are when it is moved, copied or loaded again, and nearly so when it is cast.
"""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from melora_fx.names import site_of, without_wrappers

Sums = tuple[float, float, float]
"""(sum of the values, sum of their sizes, relative precision of the dtype) of a tensor."""

_MOST_VALUES = 4096
"""Of a tensor; training changes nearly all of a parameter's."""

_LARGEST = torch.finfo(torch.float16).max
"""Values count up to this size: a mask of -inf is the same in every dtype."""

_ROUNDING = 1e-9
"""Of sums in float64 that other devices form in another order."""


def record_values(model: nn.Module, sites: Collection[str] = ()) -> dict[str, Sums]:
    """By name, what the parameters and the buffers of floats are recognised by that a `state_dict` holds; nothing of
    the weights of `sites`, which have fingerprints of their own, and of what is on meta.
    """
    return {name: _sums(tensor) for name, tensor in _readable(model) if site_of(name) not in sites}


def changed_values(model: nn.Module, recorded: Mapping[str, Sums]) -> list[str]:
    """Names of the tensors whose values are other ones than when they were `recorded`."""
    present = dict(_readable(model))
    return [name for name, sums in recorded.items() if name in present and _differ(sums, _sums(present[name]))]


def _readable(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.state_dict(keep_vars=True).items():
        values = tensor.detach() if isinstance(tensor, torch.Tensor) else tensor
        if type(values) is torch.Tensor and values.is_floating_point() and not values.is_meta:
            yield without_wrappers(name), values


def _sums(tensor: torch.Tensor) -> Sums:
    sample = tensor.flatten()[:: -(-tensor.numel() // _MOST_VALUES) or 1]
    values = sample.cpu().double().nan_to_num().clamp(-_LARGEST, _LARGEST)
    total, size = torch.stack([values.sum(), values.abs().sum()]).tolist()
    return total, size, torch.finfo(tensor.dtype).eps


def _differ(sums: Sums, others: Sums) -> bool:
    precision = _ROUNDING if sums[2] == others[2] else max(sums[2], others[2])
    bound = precision * max(sums[1], others[1])
    return any(abs(one - other) > bound for one, other in zip(sums[:2], others[:2], strict=True))
