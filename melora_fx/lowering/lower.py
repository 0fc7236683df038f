"""The last pass: each adapter's plain nodes as one call of `adapted_linear`, which trains faster.

The pass makes a graph of its own, from which the module's code is generated. The plain graph stays what is printed,
copied, saved and exported, and what runs wherever the one call would not be understood.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from melora_fx.adapter.site import SITE_TAG, SiteRecord
from melora_fx.capture.modules import copy_graph
from melora_fx.capture.packed import is_packed_linear, passes_gradient
from melora_fx.config import MELoRAConfig
from melora_fx.patterns.experts import ExpertNode, find_expert_nodes
from melora_fx.patterns.linear import (
    CASTS,
    LINEAR,
    LinearNode,
    argument,
    find_linear_nodes,
    get_attribute,
    operator_name,
    weight_of,
)

from .adapted_linear import WIDE, adapted_linear
from .grouped_blocks import grouped_blocks

aten = torch.ops.aten


def choose_lowering(config: MELoRAConfig, weight: Tensor, nodes: Sequence[LinearNode], owner: nn.Module) -> str:
    """The lowering of the site whose `weight` the `nodes` multiply by; `owner` holds the parameters of their graph.

    "plain" where one of them cannot be written as `F.linear`; else what the configuration says, where "auto" is
    "weight" for weights of 32 bits or more and no dropout, and "activation" for all others. Stacks of matrices know
    "activation" alone.
    """
    if config.lowering == "plain" or not (_are_linears(nodes, owner) or _are_groups(nodes)):
        return "plain"
    if _are_groups(nodes):
        return "activation"
    if config.lowering != "auto":
        return config.lowering
    return "weight" if _can_be_merged(weight) and not config.dropout else "activation"


def lowering_misfit(config: MELoRAConfig, weight: Tensor, nodes: Sequence[LinearNode], owner: nn.Module) -> str | None:
    """Why the site cannot have the lowering that its configuration names, or None; arguments as before."""
    if config.lowering == "plain" and not passes_gradient(weight):
        return f"`lowering` (='plain') gives no gradient to what is below this {type(weight).__name__}: use 'auto'"
    if config.lowering in ("auto", "plain") or (config.lowering == "activation" and _are_groups(nodes)):
        return None
    if not _are_linears(nodes, owner):
        return f"`lowering` (={config.lowering!r}) needs a linear that is an `F.linear` of the whole weight: use 'auto'"
    if config.lowering == "weight" and not _can_be_merged(weight):
        kind = f"{type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
        return f"`lowering` (='weight') would round W + Δ to this {kind} in every step: use 'auto' or 'activation'"
    return None


def lower(graph: fx.Graph, owner: nn.Module, records: Iterable[SiteRecord]) -> fx.Graph:
    """A copy of `graph` with one call for each site of `records` that has a lowering; `owner` holds its parameters."""
    lowered = copy_graph(graph)
    by_parameter = {record.parameter: record for record in records if record.lowering != "plain"}
    for linear in reversed(list(find_linear_nodes(lowered, owner))):  # one that feeds another is read before it goes
        if linear.parameter in by_parameter:
            _lower_node(lowered, linear, by_parameter[linear.parameter], owner)
    for expert in list(find_expert_nodes(lowered, owner)):
        if expert.parameter in by_parameter:
            _lower_groups(lowered, expert)
    return lowered


def _lower_groups(graph: fx.Graph, expert: ExpertNode) -> None:
    """Multiplies by a stack through `grouped_blocks`, to the same bits: transformers' operator makes the gradient of
    the stack in every backward, a third of the step, also where the stack is frozen.
    """
    with graph.inserting_before(expert.node):
        matrices = graph.call_function(aten.transpose.int, (argument(expert.node, 1, "weight"), 1, 2))
        call = graph.call_function(grouped_blocks, (expert.input, matrices, expert.choice))
    call.meta = dict(expert.node.meta)
    expert.node.replace_all_uses_with(call)
    graph.erase_node(expert.node)


def _lower_node(graph: fx.Graph, linear: LinearNode, record: SiteRecord, owner: nn.Module) -> None:
    operands = _operands(linear, owner)
    out_features = weight_of(owner, record.parameter).size(1 if record.weight_is_transposed else 0)
    parts, may_merge = record.config.parts(out_features), record.lowering == "weight"
    total = next(user for user in linear.node.users if user.target is aten.add.Tensor and SITE_TAG in user.meta)
    with graph.inserting_before(total):
        tensors = [graph.get_attr(record.path(kind)) for kind in ("lora_a", "lora_b", "lora_scaling")]
        dropout = graph.get_attr(record.path("lora_dropout")) if record.config.dropout else None
        if operands is None:
            arguments = (linear.input, None, None, *tensors, dropout, parts, False, linear.node)
        else:
            weight = graph.call_function(aten.t.default, (operands.weight,)) if operands.is_flipped else operands.weight
            arguments = (linear.input, weight, operands.bias, *tensors, dropout, parts, may_merge)
        call = graph.call_function(adapted_linear, arguments)
    call.meta = dict(total.meta)
    total.replace_all_uses_with(call)
    for node in [*_behind(graph, record), linear.node]:
        if not node.users:
            graph.erase_node(node)


def _behind(graph: fx.Graph, record: SiteRecord) -> list[fx.Node]:
    """The site's inserted nodes, last first."""
    return [node for node in reversed(graph.nodes) if node.meta.get(SITE_TAG) == record.parameter]


class _Operands(NamedTuple):
    """What `F.linear` would take for the same output. `is_flipped`: the weight stands (I, O)."""

    weight: fx.Node
    bias: fx.Node | None
    is_flipped: bool


def _operands(linear: LinearNode, owner: nn.Module) -> _Operands | None:
    """None for a linear that cannot be written as `F.linear` of the whole weight, bit for bit, and for a packed one."""
    node = linear.node
    if linear.rows is not None or linear.input_is_transposed:
        return None
    if node.target in LINEAR:
        bias = argument(node, 2, "bias")
        return _Operands(argument(node, 1, "weight"), bias, False) if _is_vector(bias, owner) else None
    name = operator_name(node)
    if name == "addmm" and node.kwargs.get("beta", 1) == 1:
        bias = argument(node, 0, "input", "self")
        return _Operands(argument(node, 2, "mat2"), bias, True) if _is_vector(bias, owner) else None
    if name in ("mm", "matmul"):
        right = argument(node, 1, "mat2", "other", "tensor2")
        is_view = right.op != "get_attr" and operator_name(right) in ("t", "T", "mT", "numpy_T", "transpose")
        if (right.args[0] if is_view else right).op == "get_attr":
            return _Operands(right, None, True)
    return None


def _is_vector(bias: Any, owner: nn.Module) -> bool:
    """Whether a bias is none, or a parameter of one dimension, cast or not."""
    while isinstance(bias, fx.Node) and bias.op != "get_attr" and operator_name(bias) in CASTS:
        bias = bias.args[0]
    return bias is None or getattr(get_attribute(owner, str(bias.target)), "ndim", None) == 1


def _are_linears(nodes: Sequence[LinearNode], owner: nn.Module) -> bool:
    return is_packed_linear(owner) or all(_operands(linear, owner) for linear in nodes)


def _are_groups(nodes: Sequence[LinearNode]) -> bool:
    """Whether all are products of transformers' own operator with a stack."""
    return all(operator_name(linear.node) == "grouped_mm_fallback" for linear in nodes)


def _can_be_merged(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype in WIDE
