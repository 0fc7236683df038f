"""Graphs of `torch.export` name the devices that they were made on; here they go where their module goes.

A model whose forward says `torch.arange(n, device=x.device)` has `device=cpu` in its graph if x was there. The graph
does not say which of these the model wrote itself: all follow.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from melora_fx.names import get_attribute


def devices_of(module: nn.Module) -> set[torch.device]:
    """Where the parameters and buffers of `module` are."""
    return {tensor.device for tensor in [*module.parameters(), *module.buffers()]}


def put_module_on_device(
    module: nn.Module, graph: fx.Graph, before: Collection[torch.device], after: Collection[torch.device]
) -> bool:
    """`put_on_device` of the `graph` of `module`; the graphs that it calls follow too."""
    for inner in inner_modules(module, graph):
        if put_on_device(inner.graph, before, after):
            inner.recompile()
    return put_on_device(graph, before, after)


def inner_modules(owner: nn.Module, graph: fx.Graph) -> Iterator[fx.GraphModule]:
    """The graphs that `graph` of `owner` calls, at any depth: what stood in `torch.no_grad()`, or in a branch."""
    for node in graph.find_nodes(op="get_attr"):
        inner = get_attribute(owner, str(node.target))
        if isinstance(inner, fx.GraphModule):
            yield inner
            yield from inner_modules(inner, inner.graph)


def put_on_device(graph: fx.Graph, before: Collection[torch.device], after: Collection[torch.device]) -> bool:
    """Whether `graph` named a device of `before`, which is now that of `after`; if these are several it stays.

    A device without a number, as in `device="cuda"`, stands for all of its type.
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
