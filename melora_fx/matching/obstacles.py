"""OBSTACLES: why linears cannot be adapted. Each is a function from what was found to site name → reason."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from melora_fx.capture.graphs import Capture
from melora_fx.capture.modules import capture_modules
from melora_fx.capture.packed import is_packed_linear
from melora_fx.config import MELoRAConfig
from melora_fx.names import site_name, without_wrappers
from melora_fx.patterns.node import parameter_of
from melora_fx.patterns.planned_site import PlannedSite
from melora_fx.patterns.stacks import products_with
from melora_fx.patterns.views import other_uses
from melora_fx.torch_private import DERIVED_SUFFIXES, is_convolution, registered

from .linears import group_by_weight, name_in_model


class Candidates(NamedTuple):
    """What was found in a model.

    Attributes:
        model: as it was given.
        captured: the module whose graphs are read: `model` itself, or the whole capture of it.
        captures: the graphs.
        uncaptured: the matrices of modules that could not be captured, and why.
        linears: what the graphs multiply by; a weight of two graphs is there twice.
    """

    model: nn.Module | ExportedProgram
    captured: nn.Module
    captures: list[Capture]
    uncaptured: dict[str, str]
    linears: list[PlannedSite]

    @property
    def names(self) -> set[str]:
        return {linear.name for linear in self.linears}


def find_candidates(model: nn.Module | ExportedProgram, captured: nn.Module, config: MELoRAConfig) -> Candidates:
    """Captures the modules of `captured` and finds their linears."""
    captures, uncaptured = capture_modules(captured)
    return Candidates(model, captured, captures, uncaptured, list(group_by_weight(captures, config)))


def uncaptured(candidates: Candidates) -> dict[str, str]:
    """The matrices of modules without a graph."""
    return candidates.uncaptured


def in_two_forwards(candidates: Candidates) -> dict[str, str]:
    """The linears that stand in the graphs of two modules."""
    reason = "two modules' forwards multiply by its weight: pass `example_inputs=`"
    uses = Counter(linear.name for linear in candidates.linears)
    return {name: reason for name, number in uses.items() if number > 1}


def otherwise_used(candidates: Candidates) -> dict[str, str]:
    """The linears whose weight has another use too: beside that, an adapter could not be folded."""
    reads = _reads_of_parameters({linear.capture.graph for linear in candidates.linears})
    reasons = {}
    for linear in candidates.linears:
        nodes = [node.node for node in linear.nodes]
        gathers = [node.gather for node in linear.nodes if node.gather]
        own_reads = reads.get((linear.capture.graph, linear.parameter), [])
        uses = other_uses([*own_reads, *gathers], [*nodes, *gathers])
        if isinstance(linear.owner, nn.Embedding):
            uses.append("embedding")
        if uses:
            reasons[linear.name] = f"its weight is also used by `{', '.join(uses)}`, which a fold would change"
    return reasons


def _reads_of_parameters(graphs: Iterable[fx.Graph]) -> dict[tuple[fx.Graph, str], list[fx.Node]]:
    """The `get_attr` nodes by graph and target."""
    reads: dict[tuple[fx.Graph, str], list[fx.Node]] = {}
    for graph in graphs:
        for node in graph.find_nodes(op="get_attr"):
            reads.setdefault((graph, str(node.target)), []).append(node)
    return reads


def unmatched_stack(candidates: Candidates) -> dict[str, str]:
    """The stacks of matrices that graphs multiply by in a form without a pattern."""
    matched = candidates.names
    reasons = {}
    for capture in candidates.captures:
        for node in capture.graph.find_nodes(op="get_attr"):
            stack = parameter_of(node, capture.module, dim=3)
            if stack is None or min(stack.shape) == 1:
                continue
            products = products_with(node)
            name = name_in_model(capture, str(node.target))
            if products and name not in matched:
                kind = f"a stack of matrices {tuple(stack.shape)}"
                reasons[name] = f"{kind} in a form that has no pattern: `{', '.join(products)}`"
    return reasons


def derived_weight(candidates: Candidates) -> dict[str, str]:
    """The weights that a module makes from other parameters in each forward."""
    if not isinstance(candidates.model, nn.Module):
        return {}
    reason = (
        "its weight is parametrized, pruned or normalised: a fold could not change it; make it permanent first "
        "(`parametrize.remove_parametrizations`, `prune.remove`)"
    )
    found: dict[str, str] = {}
    for path, module in candidates.model.named_modules():
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


def never_called(candidates: Candidates) -> dict[str, str]:
    """The linears that the model has and that the whole capture does not use."""
    model = candidates.model
    if not isinstance(model, nn.Module) or candidates.captured is model:
        return {}
    reason = "not in the graph: never called with these `example_inputs`, or called in a part that is exported apart"
    packed = "its weight is packed: it is adapted in place, without `example_inputs=`"
    in_place = group_by_weight(capture_modules(model)[0], MELoRAConfig())
    called = candidates.names
    return {
        linear.name: packed if is_packed_linear(linear.owner) else reason
        for linear in in_place
        if linear.name not in called
    }


def used_both_ways(candidates: Candidates) -> dict[str, str]:
    """The linears whose weight some nodes take as it is and others transposed."""
    reason = "the graph multiplies by this weight and by its transpose: one adapter cannot serve both"
    return {
        linear.name: reason
        for linear in candidates.linears
        if len({node.weight_is_transposed for node in linear.nodes}) > 1
    }


OBSTACLES = (
    uncaptured,
    in_two_forwards,
    otherwise_used,
    unmatched_stack,
    derived_weight,
    never_called,
    used_both_ways,
)


def find_obstacles(candidates: Candidates) -> dict[str, str]:
    """Name of each linear that cannot be adapted → all reasons why."""
    reasons: dict[str, list[str]] = {}
    for obstacle in OBSTACLES:
        for name, reason in obstacle(candidates).items():
            reasons.setdefault(name, []).append(reason)
    return {name: "; ".join(found) for name, found in reasons.items()}
