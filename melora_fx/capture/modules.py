"""Graphs of a model's modules: each module that owns a matrix is traced on its own, its children left as calls.

A GraphModule is taken as it is, and below it only the modules that its graph calls. `whole_model.py` makes one graph of
a whole model; the matcher and the rewriter take both alike.
"""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from melora_fx.names import join_path, site_name, without_wrappers
from melora_fx.torch_private import is_constant_of_trace, is_convolution, is_experts_layer, registered

from .bypassed import bypassed_children
from .expert_layers import IN_PLACE_REMEDY
from .graphs import Capture, copy_graph
from .packed import is_packed_linear, packed_graph


class _OwnerTracer(fx.Tracer):
    """Traces one module's own forward and leaves every child as a call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


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
            refused |= {
                site_name(join_path(path, child), name): reason for name in _matrices(module.get_submodule(child))
            }
        matrices = _matrices(module)
        if not matrices:
            continue
        try:
            captures.append(Capture(path, module, _trace(module, templates)))
        except _UntraceableError as error:
            for matrix in matrices:
                refused[site_name(path, matrix)] = IN_PLACE_REMEDY if is_experts_layer(module) else str(error)
    return captures, refused


def _matrices(module: nn.Module) -> list[str]:
    """Names of the module's own parameters that a linear could multiply by: 2-D, or 3-D for a stack of experts."""
    if is_packed_linear(module):
        return ["weight"]
    if isinstance(module, nn.Embedding | parametrize.ParametrizationList) or is_convolution(module):
        return []
    parameters = module.named_parameters(recurse=False)
    if any(isinstance(value, UninitializedParameter) for _, value in module.named_parameters(recurse=False)):
        return []  # a lazy module has no matrix yet
    return [name for name, value in parameters if value.dim() == 2 or (value.dim() == 3 and min(value.shape) > 1)]


class _UntraceableError(Exception):
    """Why a module cannot be traced on its own."""


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
        if isinstance(module, fx.GraphModule):
            names = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "call_module")
            children = [(name, module.get_submodule(name)) for name in names]
        else:
            children = list(module.named_children())
        pending.extend((join_path(path, name), child) for name, child in reversed(children))


def _trace(module: nn.Module, templates: dict[Any, fx.Graph]) -> fx.Graph:
    if "forward" in module.__dict__:
        raise _UntraceableError(
            "its `forward` was replaced on the instance (by a dispatch or offload hook), which would bypass the "
            "adapter: remove the hook first"
        )
    if is_packed_linear(module):
        return packed_graph(module)
    key = _trace_key(module)
    if key is None or key not in templates:
        graph = _trace_forward(module)
        if key is None:
            return graph
        templates[key] = graph
    return copy_graph(templates[key])


def _trace_key(module: nn.Module) -> Any:
    """What a forward can depend on, for modules that hold parameters and plain values only; None for the others."""
    own, buffers, children = registered(module)
    if children or buffers:
        return None
    values = {name: value for name, value in module.__dict__.items() if not name.startswith("_")}
    if not all(isinstance(value, int | float | str | None) for value in values.values()):
        return None
    parameters = tuple((name, value is None or value.shape) for name, value in own.items())
    return type(module), parameters, tuple(sorted(values.items(), key=lambda item: item[0]))


def _trace_forward(module: nn.Module) -> fx.Graph:
    options = [
        name
        for name, parameter in list(inspect.signature(type(module).forward).parameters.items())[1:]
        if parameter.default is None
    ]
    if options:
        raise _UntraceableError(
            f"a trace would decide for good whether {', '.join(map(repr, options))} is given: pass `example_inputs=`"
        )
    try:
        graph, other_mode = _trace_unchanged(module), _trace_in_other_mode(module)
    except _UntraceableError:
        raise
    except Exception as error:  # a forward can raise anything when it is given proxies
        raise _UntraceableError(
            f"`{type(module).__name__}.forward` cannot be traced ({_first_line(error)}): pass `example_inputs=`"
        ) from error
    if str(graph) != str(other_mode):
        raise _UntraceableError("its forward differs between train and eval mode: pass `example_inputs=`")
    return graph


def _trace_unchanged(module: nn.Module) -> fx.Graph:
    """The graph; what the forward or the tracer wrote on the module is put back, and is a reason to refuse."""
    holders: list[dict[str, Any]] = [module.__dict__, *registered(module)]
    before = [dict(holder) for holder in holders]
    tracer = _OwnerTracer()
    try:
        graph = tracer.trace(module)
        changed = [
            name
            for holder, old in zip(holders, before, strict=True)
            for name in holder
            if name not in old or holder[name] is not old[name]
        ]
    finally:
        vars(tracer).clear()  # it refers to itself, and would keep the module alive
        for holder, old in zip(holders, before, strict=True):
            holder.clear()
            holder.update(old)
    if changed:
        what = "makes tensors" if is_constant_of_trace(changed[0]) else f"sets {', '.join(map(repr, changed))}"
        raise _UntraceableError(f"its forward {what}, which a trace would do once and for all: pass `example_inputs=`")
    return graph


def _trace_in_other_mode(module: nn.Module) -> fx.Graph:
    module.training = not module.training
    try:
        return _trace_unchanged(module)
    finally:
        module.training = not module.training


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
