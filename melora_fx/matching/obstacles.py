"""OBSTACLES: why linears cannot be adapted. Each is a function from what was found to site name → reason."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from melora_fx.adapter.site import SiteRecord
from melora_fx.adapter.tensors import TENSORS
from melora_fx.capture.expert_layers import IN_PLACE_REMEDY
from melora_fx.capture.graphs import Capture
from melora_fx.capture.modules import capture_modules, matrix_names
from melora_fx.capture.packed import is_packed_linear
from melora_fx.config import MELoRAConfig
from melora_fx.names import site_name, without_wrappers
from melora_fx.patterns.node import parameter_of
from melora_fx.patterns.planned_site import PlannedSite
from melora_fx.patterns.stacks import products_with
from melora_fx.patterns.views import is_chosen_by_input, is_view, other_uses
from melora_fx.torch_private import DERIVED_SUFFIXES, is_convolution, is_experts_layer, registered

from .linears import group_by_weight, is_own, name_in_model

_LEAVE_OUT = "leave it out of `targets`"


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


def beyond_the_trace(candidates: Candidates) -> dict[str, str]:
    """The matrices with which traces have shown no product: those that did not come to their end, and those that have
    not met the matrix at all.
    """
    seen = candidates.names
    read = _read_names(candidates)
    reasons: dict[str, str] = {}
    for capture in candidates.captures:
        if not capture.runs_own_forward:
            continue
        for name in (site_name(capture.path, matrix) for matrix in matrix_names(capture.module)):
            if name not in seen and (capture.failure or name not in read):
                reasons[name] = capture.failure or _NOT_MET
    return reasons


def _read_names(candidates: Candidates) -> set[str]:
    """The names of what graphs read and use."""
    return {
        name_in_model(capture, str(node.target))
        for capture in candidates.captures
        for node in _reads(capture.graphs)
        if node.users
    }


_NOT_MET = "no trace of its module's forward has met it: pass `example_inputs=`, or leave it out of `targets`"


def in_two_forwards(candidates: Candidates) -> dict[str, str]:
    """The linears that stand in the graphs of two modules."""
    reason = "two modules' forwards multiply by its weight: pass `example_inputs=`"
    uses = Counter(linear.name for linear in candidates.linears)
    return {name: reason for name, number in uses.items() if number > 1}


def otherwise_used(candidates: Candidates) -> dict[str, str]:
    """The linears whose weight has another use too: folding an adapter would change that use."""
    reads = _reads_of_parameters(graph for linear in candidates.linears for graph in linear.capture.graphs)
    reasons = {}
    for linear in candidates.linears:
        nodes = [node.node for node in linear.nodes]
        gathers = [node.gather for node in linear.nodes if node.gather]
        own_reads = [read for graph in linear.capture.graphs for read in reads.get((graph, linear.parameter), ())]
        uses = other_uses([*own_reads, *gathers], [*nodes, *gathers])
        if isinstance(linear.owner, nn.Embedding):
            uses.append("embedding")
        if uses:
            reasons[linear.name] = (
                f"its weight is also used by `{', '.join(uses)}`, which a fold would change: {_LEAVE_OUT}"
            )
    return reasons


def _reads_of_parameters(graphs: Iterable[fx.Graph]) -> dict[tuple[fx.Graph, str], list[fx.Node]]:
    """The `get_attr` nodes by graph and target."""
    reads: dict[tuple[fx.Graph, str], list[fx.Node]] = {}
    for node in _reads(dict.fromkeys(graphs)):
        reads.setdefault((node.graph, str(node.target)), []).append(node)
    return reads


def _reads(graphs: Iterable[fx.Graph]) -> Iterator[fx.Node]:
    """The `get_attr` nodes."""
    for graph in graphs:
        yield from graph.find_nodes(op="get_attr")


def without_pattern(candidates: Candidates) -> dict[str, str]:
    """The matrices, and stacks of matrices, that graphs multiply by in a form without a pattern."""
    matched = candidates.names
    reasons = {}
    for capture in candidates.captures:
        for node in _reads(capture.graphs):
            kind = _kind_of_matrix(node, capture)
            name = name_in_model(capture, str(node.target))
            products = products_with(node) if kind and name not in matched else []
            if products and capture.runs_own_forward and not is_own(str(node.target)):
                who = capture.path or type(capture.module).__name__
                reasons[name] = f"`{who}` multiplies by it, and not its own module: pass `example_inputs=`"
            elif products:
                remedy = _LEAVE_OUT if str(kind).startswith("a stack") else _PLAIN_FORM
                reasons[name] = f"{kind} in a form that has no pattern, `{'; '.join(products)}`: {remedy}"
                if is_experts_layer(capture.module):
                    reasons[name] = IN_PLACE_REMEDY
    return reasons


_PLAIN_FORM = f"multiply by the weight itself, as `F.linear(x, weight)` does, or {_LEAVE_OUT}"


def _kind_of_matrix(node: fx.Node, capture: Capture) -> str | None:
    """What a `get_attr` node gives, if it is a matrix of a module that runs its own forward, or a stack of matrices;
    in a graph of a whole model embeddings are matrices too.
    """
    stack = parameter_of(node, capture.module, dim=3)
    if stack is not None and min(stack.shape) > 1:
        return f"a stack of matrices {tuple(stack.shape)}"
    matrix = parameter_of(node, capture.module, dim=2) if capture.runs_own_forward else None
    return None if matrix is None else f"its forward multiplies by it, a matrix {tuple(matrix.shape)},"


def rows_by_input(candidates: Candidates) -> dict[str, str]:
    """The matrices of which a graph multiplies by rows that what it computes decides."""
    reasons = {}
    for capture in candidates.captures:
        for node in _reads(capture.graphs):
            if parameter_of(node, capture.module, dim=2) is not None and _is_cut_by_input(node):
                name = name_in_model(capture, str(node.target))
                reasons[name] = f"the input decides by which rows of it the graph multiplies: {_LEAVE_OUT}"
    return reasons


def _is_cut_by_input(node: fx.Node) -> bool:
    views = [user for user in node.users if is_view(user)]
    return any((is_chosen_by_input(view) and products_with(view)) or _is_cut_by_input(view) for view in views)


def complex_weight(candidates: Candidates) -> dict[str, str]:
    """The linears of complex numbers."""
    reason = f"its weight is complex, and adapters are real: {_LEAVE_OUT}"
    return {linear.name: reason for linear in candidates.linears if linear.weight.dtype.is_complex}


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
    otherwise = f"the graph uses its weight in no product that has a pattern: {_LEAVE_OUT}"
    packed = "its weight is packed: it is adapted in place, without `example_inputs=`"
    in_place = group_by_weight(capture_modules(model)[0], MELoRAConfig())
    read = _read_names(candidates)
    return {
        linear.name: packed if is_packed_linear(linear.owner) else otherwise if linear.name in read else reason
        for linear in in_place
        if linear.name not in candidates.names
    }


def used_both_ways(candidates: Candidates) -> dict[str, str]:
    """The linears whose weight some nodes take as it is and others transposed, or cut otherwise into matrices."""
    reason = (
        "the graph multiplies by this weight and by its transpose, or cuts it into matrices of other sides, which no "
        f"adapter can serve: {_LEAVE_OUT}"
    )
    return {
        linear.name: reason
        for linear in candidates.linears
        if len({(node.weight_is_transposed, node.row_dims) for node in linear.nodes}) > 1
    }


def taken_names(candidates: Candidates) -> dict[str, str]:
    """The linears whose module already has what an adapter would be called."""
    reasons = {}
    for linear in candidates.linears:
        names = [SiteRecord.attribute_of(linear.parameter, kind) for kind in TENSORS]
        taken = [f"`{name}`" for name in names if hasattr(linear.owner, name)]
        if taken:
            reasons[linear.name] = f"its module already has {', '.join(taken)}: rename it, the adapter needs that name"
    return reasons


OBSTACLES = (
    uncaptured,
    beyond_the_trace,
    in_two_forwards,
    otherwise_used,
    without_pattern,
    rows_by_input,
    complex_weight,
    derived_weight,
    never_called,
    used_both_ways,
    taken_names,
)


def find_obstacles(candidates: Candidates) -> dict[str, str]:
    """Name of each linear that cannot be adapted → all reasons why."""
    reasons: dict[str, list[str]] = {}
    for obstacle in OBSTACLES:
        for name, reason in obstacle(candidates).items():
            reasons.setdefault(name, []).append(reason)
    return {name: "; ".join(found) for name, found in reasons.items()}
