"""Graphs of a model's modules: each module that owns a matrix is traced on its own, its children left as calls.

A GraphModule is taken as it is, and below it only the modules that its graph calls. `whole_model.py` makes one graph of
a whole model; the matcher and the rewriter take both alike.
"""

from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from melora_fx.names import join_path, site_name, without_wrappers
from melora_fx.torch_private import is_convolution, is_experts_layer

from .bypassed import bypassed_children
from .expert_layers import IN_PLACE_REMEDY
from .graphs import Capture, copy_graph
from .packed import is_packed_linear
from .trace import UntraceableError, trace_module


def capture_modules(model: nn.Module) -> tuple[list[Capture], dict[str, str]]:
    """One graph for each module of `model` that owns a matrix, and for each GraphModule.

    Changes nothing. A module used in several places is captured once, under its first name.

    Returns:
        the captures in the order of `named_modules`, and for each matrix that could not be captured, its name and why.
    """
    captures: list[Capture] = []
    refused: dict[str, str] = {}
    templates: dict[Any, fx.Graph] = {}
    for path, module in _called_modules(model):
        if isinstance(module, fx.GraphModule):
            captures.append(Capture(path, module, copy_graph(module.graph)))
            continue
        for child, reason in bypassed_children(module):
            refused |= _refusals(join_path(path, child), module.get_submodule(child), reason)
        if not _matrices(module):
            continue
        try:
            captures.append(Capture(path, module, trace_module(module, templates)))
        except UntraceableError as error:
            reason = IN_PLACE_REMEDY if is_experts_layer(module) else str(error)
            refused |= _refusals(path, module, reason)
    return captures, refused


def _refusals(path: str, module: nn.Module, reason: str) -> dict[str, str]:
    """`reason` for each matrix of the module at `path`."""
    return {site_name(path, matrix): reason for matrix in _matrices(module)}


def _matrices(module: nn.Module) -> list[str]:
    """Names of the module's own parameters that a linear could multiply by: 2-D, or 3-D for a stack of experts."""
    if is_packed_linear(module):
        return ["weight"]
    if isinstance(module, nn.Embedding | parametrize.ParametrizationList) or is_convolution(module):
        return []
    parameters = dict(module.named_parameters(recurse=False))
    if any(isinstance(value, UninitializedParameter) for value in parameters.values()):
        return []  # a lazy module has no matrix yet
    return [name for name, value in parameters.items() if _is_matrix_or_stack(value)]


def _is_matrix_or_stack(parameter: nn.Parameter) -> bool:
    return parameter.dim() == 2 or (parameter.dim() == 3 and min(parameter.shape) > 1)


def _called_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by name; below a GraphModule only what its graph calls, since the rest merely holds."""
    seen: set[int] = set()
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield without_wrappers(path), module
        children = reversed(list(_called_children(module)))
        pending.extend((join_path(path, name), child) for name, child in children)


def _called_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, fx.GraphModule):
        yield from module.named_children()
        return
    names = dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="call_module"))
    for name in names:
        yield name, module.get_submodule(name)
