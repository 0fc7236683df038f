"""Finds the parameters of a model that share memory: tied ones, and views of each other."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .names import without_wrappers

_Span = tuple[int, int, int, str]
"""(device number, address of the first byte, address after the last byte, name) of a parameter."""


def sharing_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Returns the name of each parameter that shares memory with others, mapped to their names in the model's order.

    A module that is used in several places counts once, under its first name.
    """
    spans = list(_spans(model))
    order = {name: index for index, (*_, name) in enumerate(spans)}
    shared: dict[str, tuple[str, ...]] = {}
    for group in _overlapping(spans):
        names = sorted(group, key=order.__getitem__)
        shared |= {name: tuple(other for other in names if other != name) for name in names}
    return shared


def _spans(model: nn.Module) -> Iterator[_Span]:
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            yield (*span_of(parameter), without_wrappers(name))


def _overlapping(spans: Iterable[_Span]) -> Iterator[list[str]]:
    """Yields groups of two or more names whose spans overlap."""
    group: list[str] = []
    group_end = (0, 0)
    for device, start, end, name in sorted(spans):
        if not group or (device, start) >= group_end:
            if len(group) > 1:
                yield group
            group = []
            group_end = (device, end)
        group.append(name)
        group_end = max(group_end, (device, end))
    if len(group) > 1:
        yield group


def overlap(span: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Returns whether two spans have memory in common."""
    return span[0] == other[0] and span[1] < other[2] and other[1] < span[2]


def span_of(parameter: torch.Tensor) -> tuple[int, int, int]:
    """Returns (device number, address of the first byte, address after the last byte) of a parameter's memory.

    If the parameter has no plain memory (on the meta device, empty, a tensor subclass), returns a unique span instead.
    """
    tensor = parameter.detach()
    if type(tensor) is not torch.Tensor or tensor.is_meta or not tensor.numel():
        return -2, id(parameter), id(parameter) + 1
    last = tensor.numel() - 1
    if not tensor.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return tensor.get_device(), start, start + (last + 1) * tensor.element_size()
