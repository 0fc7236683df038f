"""The lowering of experts in transformers' grouped form: computes the base's product with `grouped_blocks` too.

The bits are those of transformers' operator. The backward of that operator computes the gradient of the stack even if
the stack is frozen, which takes a third of the step.
"""

import torch
from torch import fx, nn

from melora_fx.adapter.site import SiteRecord
from melora_fx.patterns.grouped_blocks import grouped_blocks
from melora_fx.patterns.node import LinearNode, argument, operator_key
from melora_fx.patterns.planned_site import PlannedSite

from .lowering import Lowering

aten = torch.ops.aten


def _misfit(site: PlannedSite) -> str | None:
    if all(operator_key(linear.node) == "transformers.grouped_mm_fallback.default" for linear in site.nodes):
        return None
    return "this lowering needs transformers' own operator for grouped experts"


def _replace(graph: fx.Graph, linear: LinearNode, record: SiteRecord, owner: nn.Module) -> None:
    with graph.inserting_before(linear.node):
        matrices = graph.call_function(aten.transpose.int, (argument(linear.node, 1, "weight"), 1, 2))
        call = graph.call_function(grouped_blocks, (linear.input, matrices, linear.choice))
    call.meta = dict(linear.node.meta)
    linear.node.replace_all_uses_with(call)
    graph.erase_node(linear.node)


GROUPED = Lowering("grouped", "activation", _misfit, _replace)
