"""Why a linear cannot be adapted: site name → reason."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from melora_fx.capture.graphs import Capture
from melora_fx.capture.modules import capture_modules
from melora_fx.capture.packed import is_packed_linear
from melora_fx.config import MELoRAConfig
from melora_fx.names import join_path, site_name, without_wrappers
from melora_fx.patterns.experts import ExpertNode, products_with
from melora_fx.patterns.node import parameter_of
from melora_fx.patterns.views import other_uses
from melora_fx.torch_private import DERIVED_SUFFIXES, is_convolution, registered

from .linears import PlannedSite, group_by_weight


def unmatched_stacks(captures: list[Capture], found: Mapping[str, PlannedSite]) -> dict[str, str]:
    """The stacks of matrices that graphs multiply by in a form without a pattern."""
    reasons = {}
    for capture in captures:
        for node in capture.graph.find_nodes(op="get_attr"):
            stack = parameter_of(node, capture.module, dim=3)
            if stack is None or min(stack.shape) == 1:
                continue
            products = products_with(node)
            owner, _, attribute = str(node.target).rpartition(".")
            name = site_name(join_path(capture.path, owner), attribute)
            if products and name not in found:
                kind = f"a stack of matrices {tuple(stack.shape)}"
                reasons[name] = f"{kind} in a form that has no pattern: `{', '.join(products)}`"
    return reasons


def never_called(model: nn.Module, found: Mapping[str, PlannedSite], config: MELoRAConfig) -> dict[str, str]:
    """The linears that the model has and that the whole capture does not use."""
    in_place, _ = group_by_weight(capture_modules(model)[0], config)
    reason = "not in the graph: never called with these `example_inputs`, or called in a part that is exported apart"
    packed = "its weight is packed: it is adapted in place, without `example_inputs=`"
    return {
        name: packed if is_packed_linear(planned.owner) else reason
        for name, planned in in_place.items()
        if name not in found
    }


def otherwise_used(found: Mapping[str, PlannedSite]) -> dict[str, str]:
    """The linears whose weight has another use too: beside that, an adapter could not be folded."""
    reads = _reads_of_parameters({planned.capture.graph for planned in found.values()})
    reasons = {}
    for name, planned in found.items():
        nodes = [linear.node for linear in planned.nodes]
        gathers = [linear.gather for linear in planned.nodes if isinstance(linear, ExpertNode) and linear.gather]
        own_reads = reads.get((planned.capture.graph, planned.parameter), [])
        uses = other_uses([*own_reads, *gathers], [*nodes, *gathers])
        if isinstance(planned.owner, nn.Embedding):
            uses.append("embedding")
        if uses:
            reasons[name] = f"its weight is also used by `{', '.join(uses)}`, which a fold would change"
    return reasons


def _reads_of_parameters(graphs: Iterable[fx.Graph]) -> dict[tuple[fx.Graph, str], list[fx.Node]]:
    """The `get_attr` nodes by graph and target."""
    reads: dict[tuple[fx.Graph, str], list[fx.Node]] = {}
    for graph in graphs:
        for node in graph.find_nodes(op="get_attr"):
            reads.setdefault((graph, str(node.target)), []).append(node)
    return reads


def used_both_ways(found: Mapping[str, PlannedSite]) -> dict[str, str]:
    """The linears whose weight some nodes take as it is and others transposed."""
    reason = "the graph multiplies by this weight and by its transpose: one adapter cannot serve both"
    return {name: reason for name, planned in found.items() if planned.is_used_both_ways}


def derived_weights(model: nn.Module) -> dict[str, str]:
    """The weights that a module makes from other parameters in each forward: site name → why it cannot be adapted."""
    reason = (
        "its weight is parametrized, pruned or normalised: a fold could not change it; make it permanent first "
        "(`parametrize.remove_parametrizations`, `prune.remove`)"
    )
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if is_convolution(module):
            continue
        names = _derived_names(module)
        found |= {site_name(without_wrappers(path), name): reason for name in names if name != "bias"}
    return found


def _derived_names(module: nn.Module) -> list[str]:
    """Names of the module's tensors that it makes from its parameters."""
    own, _, _ = registered(module)
    parametrized: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
    made_by_hooks = [
        name
        for name, value in vars(module).items()  # a tensor that is no parameter
        if isinstance(value, Tensor) and any(f"{name}{suffix}" in own for suffix in DERIVED_SUFFIXES)
    ]
    return [*parametrized, *made_by_hooks]
