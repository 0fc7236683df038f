"""The last pass: each adapter's plain nodes as one call of `adapted_linear`, which trains faster.

The pass makes a graph of its own, from which the module's code is generated. The plain graph stays what is printed,
copied, saved and exported, and what runs wherever the one call would not be understood.
"""

from collections.abc import Iterable

import torch
from torch import fx, nn

from melora_fx.adapter.site import SITE_TAG, SiteRecord
from melora_fx.adapter.tensors import features_of
from melora_fx.capture.graphs import copy_graph
from melora_fx.patterns.experts import ExpertNode, find_expert_nodes
from melora_fx.patterns.linear import find_linear_nodes
from melora_fx.patterns.node import LinearNode, argument, weight_of

from .adapted_linear import adapted_linear
from .choice import operands_of
from .grouped_blocks import grouped_blocks

aten = torch.ops.aten


def lower(graph: fx.Graph, owner: nn.Module, records: Iterable[SiteRecord]) -> fx.Graph:
    """A copy of `graph` with one call for each site of `records` that has a lowering; `owner` holds its parameters."""
    lowered = copy_graph(graph)
    by_parameter = {record.parameter: record for record in records if record.lowering != "plain"}
    for linear in reversed(list(find_linear_nodes(lowered, owner))):  # an earlier one may erase its input
        if linear.parameter in by_parameter:
            _lower_node(lowered, linear, by_parameter[linear.parameter], owner)
    for expert in list(find_expert_nodes(lowered, owner)):
        if expert.parameter in by_parameter:
            _lower_groups(lowered, expert)
    return lowered


def _lower_groups(graph: fx.Graph, expert: ExpertNode) -> None:
    """Multiplies by a stack through `grouped_blocks`, to the same bits.

    The backward of transformers' operator always computes the gradient of the stack, which takes a third of the step,
    even if the stack is frozen.
    """
    with graph.inserting_before(expert.node):
        matrices = graph.call_function(aten.transpose.int, (argument(expert.node, 1, "weight"), 1, 2))
        call = graph.call_function(grouped_blocks, (expert.input, matrices, expert.choice))
    call.meta = dict(expert.node.meta)
    expert.node.replace_all_uses_with(call)
    graph.erase_node(expert.node)


def _lower_node(graph: fx.Graph, linear: LinearNode, record: SiteRecord, owner: nn.Module) -> None:
    """Replaces a linear and its adapter by one call; a linear that is no `F.linear` stays, as the base of that."""
    operands = operands_of(linear, owner)
    stored = weight_of(owner, record.parameter)
    _, out_features = features_of(stored, is_transposed=record.weight_is_transposed)
    parts = record.config.parts(out_features)
    may_merge = record.lowering == "weight"
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
    """The nodes that `rewrite` inserted for the site, last first."""
    return [node for node in reversed(graph.nodes) if node.meta.get(SITE_TAG) == record.parameter]
