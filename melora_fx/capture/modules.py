"""Captures each module of a model that owns a matrix: the graph of a linear, or what traces show; children are calls.

A GraphModule is captured unchanged, and below it only the modules that its graph calls. `whole_model.py` builds one
graph of a whole model; the matcher and the rewriter accept both.
"""

import inspect
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from melora_fx.distributed.private import tensor_parallel_forward
from melora_fx.names import join_path, site_name, without_wrappers
from melora_fx.torch_private import is_convolution, is_experts_layer

from .expert_layers import IN_PLACE_REMEDY
from .graphs import Capture, copy_graph
from .linear_graph import linear_graph
from .own_products import reads_others
from .packed import is_packed_linear
from .trace import KEEPS, Proxies, UntraceableError, keeping, refuse_replaced_forward, trace_module


def capture_modules(model: nn.Module) -> tuple[list[Capture], dict[str, str]]:
    """Captures each module of `model` that owns a matrix or may multiply by a matrix of another, and each GraphModule.

    Changes nothing. A module that is used in several places is captured once, under its first name.

    Returns:
        The captures in the order of `named_modules`, and name → reason for each matrix that could not be captured.
    """
    captures: list[Capture] = []
    refused: dict[str, str] = {}
    proxies: list[tuple[Capture, Proxies]] = []
    for path, module in _called_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            refused |= _refusals(path, module, _SCRIPTED)
        elif isinstance(module, fx.GraphModule):
            captures.append(Capture(path, module, copy_graph(module.graph)))
        elif isinstance(module, nn.MultiheadAttention):
            refused |= _refusals(join_path(path, "out_proj"), module.out_proj, _IN_ONE_CALL)
            refused |= _refusals(path, module, _IN_ONE_CALL)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            refused |= _refusals(path, module, _RECURRENT.format(type(module).__name__))
        elif matrix_names(module) or _has_other_parameters(module) or reads_others(module):
            try:
                captures.append(_capture(path, module, proxies))
            except UntraceableError as error:
                refused |= _refusals(path, module, str(error))
    for capture in keeping(proxies):
        captures = [each for each in captures if each is not capture]
        refused |= _refusals(capture.path, capture.module, KEEPS)
    return captures, refused


_SCRIPTED = "TorchScript has compiled it: call `rewrite` before `torch.jit.script` or `torch.jit.trace`"
_WHOLE = "pass `example_inputs=`"
_RECURRENT = "`nn.{}` passes its weights to one function of torch, past any adapter: leave it out of `targets`"
_IN_ONE_CALL = f"`nn.MultiheadAttention` passes its weights to one function of torch, past any adapter: {_WHOLE}"


def _capture(path: str, module: nn.Module, proxies: list[tuple[Capture, Proxies]]) -> Capture:
    """Returns the capture of one module. If it is traced, adds the capture and its traces' proxies to `proxies`."""
    graph = linear_graph(module)
    if graph is not None:
        if tensor_parallel_forward(module) is None:  # a tensor-parallel forward is put around ours again
            refuse_replaced_forward(module)
        return Capture(path, module, graph)
    if inspect.getattr_static(type(module), "forward") is nn.Module.forward:
        raise UntraceableError(f"`{type(module).__name__}` has no forward, other modules compute with it: {_WHOLE}")
    traces = trace_module(module)
    first, *others = traces.graphs
    failure = traces.failure
    if failure and is_experts_layer(module):
        failure = IN_PLACE_REMEDY
    elif failure:
        failure = f"`{type(module).__name__}.forward` cannot be traced ({failure}): {_WHOLE}"
    capture = Capture(path, module, first, tuple(others), runs_own_forward=True, failure=failure)
    proxies.append((capture, traces.proxies))
    return capture


def _refusals(path: str, module: nn.Module, reason: str) -> dict[str, str]:
    """Returns `reason` for each matrix of the module at `path`."""
    return {site_name(path, matrix): reason for matrix in matrix_names(module)}


def matrix_names(module: nn.Module) -> list[str]:
    """Returns the names of the module's own parameters that a linear could multiply by: 2-D, or 3-D for a stack."""
    if is_packed_linear(module):
        return ["weight"]
    if isinstance(module, nn.Embedding | parametrize.ParametrizationList) or is_convolution(module):
        return []
    parameters = dict(module.named_parameters(recurse=False))
    if is_experts_layer(module):  # its biases have two dimensions
        return [name for name, value in parameters.items() if value.dim() == 3]
    return [name for name, value in parameters.items() if _is_matrix_or_stack(value)]


def _is_matrix_or_stack(parameter: nn.Parameter) -> bool:
    return parameter.dim() == 2 or (parameter.dim() == 3 and min(parameter.shape) > 1)


def _has_other_parameters(module: nn.Module) -> bool:
    """Returns whether a module without matrices owns another parameter that a product may use, such as a kernel."""
    if isinstance(module, nn.Embedding | parametrize.ParametrizationList) or is_convolution(module):
        return False
    return any(sum(size > 1 for size in value.shape) > 1 for value in module.parameters(recurse=False))


def _called_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the model's modules by name; below a GraphModule only those that its graph calls: the rest never runs."""
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
