"""Which sites have weights that overlap in memory with other parameters."""

from collections.abc import Iterator

import torch
from torch import nn

from melora_fx.names import without_wrappers
from melora_fx.rewriting.sites import AdapterSite


def shared_sites(model: nn.Module, found: dict[str, AdapterSite]) -> dict[str, list[str]]:
    """The sites whose weight is in part another parameter of the model too: site name → names of the others."""
    shared: dict[str, list[str]] = {}
    for names in _in_one_memory(model):
        shared |= {name: [other for other in names if other != name] for name in names if name in found}
    return shared


def _in_one_memory(model: nn.Module) -> Iterator[list[str]]:
    """Groups of parameters that overlap in memory, named as sites; a module used in several places counts once."""
    spans = sorted(
        (*_span(parameter), without_wrappers(name).removesuffix(".weight"))
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False)
    )
    group: list[str] = []
    group_end = (-1, 0)
    for device, start, end, name in spans:
        if group and (device, start) < group_end:
            group.append(name)
        else:
            if len(group) > 1:
                yield group
            group = [name]
            group_end = (device, end)
        group_end = max(group_end, (device, end))
    if len(group) > 1:
        yield group


def _span(parameter: torch.Tensor) -> tuple[int, int, int]:
    """(device's number, first byte, end) of the memory that a parameter lives in; itself, where it has none."""
    tensor = parameter.detach()
    if type(tensor) is not torch.Tensor or tensor.is_meta or not tensor.numel():
        return -2, id(parameter), id(parameter) + 1
    last = tensor.numel() - 1
    if not tensor.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return tensor.get_device(), start, start + (last + 1) * tensor.element_size()
