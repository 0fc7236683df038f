"""Moves the devices that a graph of `torch.export` names along with its module.

A graph names the devices of the export: if a forward contains `torch.arange(n, device=x.device)` and x was on the CPU,
the graph contains `device=cpu`. It does not record which devices the model itself wrote out, so all of them move.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from melora_fx.names import get_attribute


def devices_of(module: nn.Module) -> set[torch.device]:
    """Returns the devices of the parameters and buffers of `module`."""
    return {tensor.device for tensor in [*module.parameters(), *module.buffers()]}


def put_module_on_device(
    module: nn.Module, graph: fx.Graph, before: Collection[torch.device], after: Collection[torch.device]
) -> bool:
    """Applies `put_on_device` to the `graph` of `module`, and to its inner graphs; returns whether `graph` changed."""
    for inner in inner_modules(module, graph):
        if put_on_device(inner.graph, before, after):
            inner.recompile()
    return put_on_device(graph, before, after)


def inner_modules(owner: nn.Module, graph: fx.Graph) -> Iterator[fx.GraphModule]:
    """Yields the graphs that `graph` of `owner` calls, at any depth: bodies of `torch.no_grad()` and of branches."""
    for node in graph.find_nodes(op="get_attr"):
        inner = get_attribute(owner, str(node.target))
        if isinstance(inner, fx.GraphModule):
            yield inner
            yield from inner_modules(inner, inner.graph)


def put_on_device(graph: fx.Graph, before: Collection[torch.device], after: Collection[torch.device]) -> bool:
    """Replaces the devices of `before` in `graph` with the device in `after`, and returns whether any was replaced.

    If `after` contains several devices, the graph stays unchanged. A device without an index, as in `device="cuda"`,
    stands for every device of its type.
    """
    targets = {*after}
    left = {*before} - targets
    if len(targets) != 1 or not left:
        return False
    (target,) = targets

    def follow(value: Any) -> Any:
        return target if isinstance(value, torch.device) and _is_among(value, left) else value

    changed = False
    for node in graph.nodes:
        args = map_aggregate(node.args, follow)
        kwargs = map_aggregate(node.kwargs, follow)
        if (args, kwargs) != (node.args, node.kwargs):
            node.args = args
            node.kwargs = kwargs
            changed = True
    return changed


def _is_among(device: torch.device, others: Collection[torch.device]) -> bool:
    return device in others or (device.index is None and device.type in {other.type for other in others})
