"""Graphs of `torch.export` name the devices that they were made on; here they go where their module goes.

A model whose forward says `torch.arange(n, device=x.device)` has `device=cpu` in its graph if x was there. The graph
does not say which of these the model wrote itself: all follow.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate


def devices_of(module: nn.Module) -> set[torch.device]:
    """Where the parameters and buffers of `module` are."""
    return {tensor.device for tensor in [*module.parameters(), *module.buffers()]}


def put_on_device(graph: fx.Graph, before: Iterable[torch.device], after: Iterable[torch.device]) -> bool:
    """Whether `graph` named a device of `before`, which is now that of `after`; if these are several it stays."""
    targets = {*after}
    left = {*before} - targets
    if len(targets) != 1 or not left:
        return False
    (target,) = targets

    def follow(value: Any) -> Any:
        return target if isinstance(value, torch.device) and value in left else value

    changed = False
    for node in graph.nodes:
        args = map_aggregate(node.args, follow)
        kwargs = map_aggregate(node.kwargs, follow)
        if (args, kwargs) != (node.args, node.kwargs):
            node.args = args
            node.kwargs = kwargs
            changed = True
    return changed
