"""Finds frozen tensors that have changed since `rewrite`, such as a BatchNorm's statistics, or a bias trained since.

No adapter folder contains them. A tensor is recognised by two sums over its values, or over a sample of them if it is
large. The sums stay the same if the tensor is moved, copied or loaded again, and nearly the same if it is cast.
"""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from melora_fx.names import site_of, without_wrappers

Sums = tuple[float, float, float]
"""(sum of the values, sum of their absolute values, relative precision of the dtype) of a tensor."""

_MOST_VALUES = 4096
"""The most values of a tensor that are summed; training changes nearly all values of a parameter."""

_LARGEST = torch.finfo(torch.float16).max
"""Values are clamped to this magnitude, so a mask of -inf is the same in every dtype."""

_ROUNDING = 1e-9
"""The relative rounding error of sums in float64, which devices compute in different orders."""


def record_values(model: nn.Module, sites: Collection[str] = ()) -> dict[str, Sums]:
    """Returns the sums of each floating-point parameter and buffer in the `state_dict`, by name.

    Weights of `sites` are left out, since they have their own fingerprints, and so are tensors on the meta device and
    tensors of a subclass.
    """
    return {name: _sums(tensor) for name, tensor in _readable(model) if site_of(name) not in sites}


def changed_values(model: nn.Module, recorded: Mapping[str, Sums]) -> list[str]:
    """Returns the names of the tensors whose values differ from those that were `recorded`."""
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
