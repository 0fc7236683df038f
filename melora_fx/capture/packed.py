"""Quantised linears: those whose weight only their own forward can read, and those without a gradient for their input.

bitsandbytes, `torch.ao`'s dynamic int8 and the packed formats (GPTQ, AWQ, HQQ) keep the weight packed. Such a module's
forward stays as it is and is the base; the graph calls it by an attribute of the rewritten module:

    y = self.base_forward(x) + adapter(x)

O out_features, I in_features.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

BASE_FORWARD = "base_forward"
"""Attribute of a rewritten module: the forward that it had before."""


def is_packed_linear(module: nn.Module) -> bool:
    """Whether `module` has the `in_features` and `out_features` of a linear, and its weight not as floats."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    if any(value.is_floating_point() and value.dim() == 2 for value in module.parameters()):
        return False
    if any(is_packed_linear(child) for child in module.children()):
        return False  # it merely holds one
    held = [*module.parameters(), *module.buffers()]
    has_integers = any(value.dtype in _INTEGERS and value.dim() == 2 for value in held)
    return has_integers or inspect.ismethod(getattr(module, "weight", None))  # as `torch.ao` has it


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def packed_weight(module: Any) -> Tensor:
    """What stands for the weight of a packed linear: an int8 tensor (O, I) on the meta device, without values."""
    return torch.empty(module.out_features, module.in_features, dtype=torch.int8, device="meta")


def packed_graph(module: nn.Module) -> fx.Graph:
    """The graph of a packed linear: a call of its own forward, with the arguments of that."""
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
    """`forward(*inputs)`, x first: what the base of a packed linear is in a graph."""
    return forward(*inputs)


def device_of(module: nn.Module, weight: Tensor) -> torch.device:
    """Where `weight` is, or, for a packed one, what `module` holds of it; the CPU where that cannot be seen."""
    if not weight.is_meta or not is_packed_linear(module):
        return weight.device
    return next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
