"""Builds the graphs of the linear modules of torch and transformers. Their forwards are known, so none is run."""

import inspect
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .packed import is_packed_linear, packed_graph


def linear_graph(module: nn.Module) -> fx.Graph | None:
    """Returns the graph of an `nn.Linear`, a subclass with its forward, transformers' `Conv1D` or a packed linear.

    Returns None for a module with another forward, and for a linear with a custom `__call__` or `__setattr__`.
    """
    if is_packed_linear(module):
        return packed_graph(module)
    if any(inspect.getattr_static(type(module), name) is not getattr(nn.Module, name) for name in _PLAIN):
        return None  # `torch.compile` ignores a custom `__call__` of a GraphModule, and attributes of it are set
    forward: Any = inspect.getattr_static(type(module), "forward")  # not a function if the module is scripted
    if forward is nn.Linear.forward:
        return _graph_of_linear(module)
    names = (getattr(forward, "__module__", ""), getattr(forward, "__qualname__", ""))
    if names == ("transformers.pytorch_utils", "Conv1D.forward"):
        return _graph_of_conv1d(module)
    return None


_PLAIN = ("__call__", "__setattr__")


def _graph_of_linear(module: nn.Module) -> fx.Graph:
    """y = x Wᵀ + b"""
    graph = fx.Graph()
    x = graph.placeholder("input")
    weight = graph.get_attr("weight")
    bias = None if module.bias is None else graph.get_attr("bias")
    graph.output(graph.call_function(F.linear, (x, weight, bias)))
    return graph


def _graph_of_conv1d(module: Any) -> fx.Graph:
    """y = x W + b, as a product of two matrices: x is viewed as (tokens, features)."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_method("size", (x,))
    leading = graph.call_function(operator.getitem, (size, slice(None, -1)))
    output_size = graph.call_function(operator.add, (leading, (module.nf,)))
    bias = graph.get_attr("bias")
    rows = graph.call_method("view", (x, -1, graph.call_method("size", (x, -1))))
    product = graph.call_function(torch.addmm, (bias, rows, graph.get_attr("weight")))
    graph.output(graph.call_method("view", (product, output_size)))
    return graph
