"""Recognises packed linears, whose quantised weight only their own forward can read, and builds their graphs.

bitsandbytes, `torch.ao`'s dynamic int8 and the packed formats (GPTQ, AWQ, HQQ) keep the weight packed. The forward of a
packed linear stays unchanged and is the base. The graph calls it through an attribute of the rewritten module:

    y = self.base_forward(x) + adapter(x)

O out_features, I in_features.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

BASE_FORWARD = "base_forward"
"""Attribute of a rewritten module: the forward that it had before the rewrite."""


def is_packed_linear(module: nn.Module) -> bool:
    """Returns whether `module` has the `in_features` and `out_features` of a linear, but no weight of floats."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    if any(value.is_floating_point() and value.dim() == 2 for value in module.parameters()):
        return False
    if any(is_packed_linear(child) for child in module.children()):
        return False  # it only contains one
    held = [*module.parameters(), *module.buffers()]
    has_integers = any(value.dtype in _INTEGERS and value.dim() == 2 for value in held)
    return has_integers or inspect.ismethod(getattr(module, "weight", None))  # as in `torch.ao`


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def packed_weight(module: Any) -> Tensor:
    """Returns a stand-in for the weight of a packed linear: int8, (O, I), on the meta device, without values."""
    return torch.empty(module.out_features, module.in_features, dtype=torch.int8, device="meta")


def packed_graph(module: nn.Module) -> fx.Graph:
    """Returns the graph of a packed linear: a call of its own forward, with the named arguments of that forward."""
    graph = fx.Graph()
    named = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    inputs = [graph.placeholder(parameter.name, default_value=parameter.default) for parameter in named]
    graph.output(graph.call_function(run_base_forward, (graph.get_attr(BASE_FORWARD), *inputs)))
    return graph


def run_base_forward(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Returns `forward(*inputs)`, x first. A graph calls this function as the base of a packed linear."""
    return forward(*inputs)


def device_of(module: nn.Module, weight: Tensor) -> torch.device:
    """Returns the device of `weight`; for a packed linear, that of the module's first tensor, else the CPU."""
    if not weight.is_meta or not is_packed_linear(module):
        return weight.device
    return next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
