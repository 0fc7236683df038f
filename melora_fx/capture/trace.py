"""The graph of one module by a trace of its own forward, and why a module has none.

A trace decides once and for all what a forward decides by its mode, its options or its data; such forwards are refused.
"""

import inspect
from typing import Any

from torch import fx, nn

from melora_fx.torch_private import is_constant_of_trace, registered

from .graphs import copy_graph
from .packed import is_packed_linear, packed_graph


class UntraceableError(Exception):
    """Why a module cannot be traced on its own."""


def trace_module(module: nn.Module, templates: dict[Any, fx.Graph]) -> fx.Graph:
    """A graph of the module's own forward, with its children as calls; nothing of the module is changed.

    Args:
        module: the module to trace.
        templates: graphs of the modules traced so far, by what their forward can depend on; added to. Equal modules,
            as the layers of a model, are traced once.

    Raises:
        UntraceableError: where a trace would not be right for every call.
    """
    if "forward" in vars(module):
        raise UntraceableError(
            "its `forward` was replaced on the instance (by a dispatch or offload hook), which would bypass the "
            "adapter: remove the hook first"
        )
    if is_packed_linear(module):
        return packed_graph(module)
    key = _template_key(module)
    if key is None:
        return _trace_forward(module)
    if key not in templates:
        templates[key] = _trace_forward(module)
    return copy_graph(templates[key])


def _template_key(module: nn.Module) -> Any:
    """What a forward can depend on, for modules that hold parameters and plain values only; None for the others."""
    own, buffers, children = registered(module)
    if children or buffers:
        return None
    values = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    if not all(isinstance(value, int | float | str | None) for value in values.values()):
        return None
    parameters = tuple((name, value is None or value.shape) for name, value in own.items())
    return type(module), parameters, tuple(sorted(values.items(), key=lambda item: item[0]))


def _trace_forward(module: nn.Module) -> fx.Graph:
    """The graph, where it is the same in train and eval mode and whatever optional arguments are given."""
    _refuse_options(module)
    try:
        graph = _trace_unchanged(module)
        other_mode = _trace_in_other_mode(module)
    except UntraceableError:
        raise
    except Exception as error:  # a forward can raise anything when it is given proxies
        raise UntraceableError(
            f"`{type(module).__name__}.forward` cannot be traced ({_first_line(error)}): pass `example_inputs=`"
        ) from error
    if str(graph) != str(other_mode):
        raise UntraceableError("its forward differs between train and eval mode: pass `example_inputs=`")
    return graph


def _refuse_options(module: nn.Module) -> None:
    """Raises for arguments that are None where they are not given: a trace would fix whether they are."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]  # without `self`
    options = [parameter.name for parameter in parameters if parameter.default is None]
    if options:
        raise UntraceableError(
            f"a trace would decide for good whether {', '.join(map(repr, options))} is given: pass `example_inputs=`"
        )


def _trace_unchanged(module: nn.Module) -> fx.Graph:
    """The graph; what the forward or the tracer wrote on the module is put back, and is a reason to refuse."""
    holders: list[dict[str, Any]] = [vars(module), *registered(module)]
    before = [dict(holder) for holder in holders]
    tracer = _OwnerTracer()
    try:
        graph = tracer.trace(module)
        changed = _changed_keys(holders, before)
    finally:
        vars(tracer).clear()  # it refers to itself, and would keep the module alive
        for holder, old in zip(holders, before, strict=True):
            holder.clear()
            holder.update(old)
    if changed:
        what = "makes tensors" if is_constant_of_trace(changed[0]) else f"sets {', '.join(map(repr, changed))}"
        raise UntraceableError(f"its forward {what}, which a trace would do once and for all: pass `example_inputs=`")
    return graph


def _changed_keys(holders: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """The keys that are new in `holders` or hold another object than they did in `before`."""
    return [
        name
        for holder, old in zip(holders, before, strict=True)
        for name in holder
        if name not in old or holder[name] is not old[name]
    ]


def _trace_in_other_mode(module: nn.Module) -> fx.Graph:
    module.training = not module.training
    try:
        return _trace_unchanged(module)
    finally:
        module.training = not module.training


class _OwnerTracer(fx.Tracer):
    """Traces one module's own forward and leaves every child as a call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
