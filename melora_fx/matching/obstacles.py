"""OBSTACLES: why linears cannot be adapted. Each is a function from the candidates to site name → reason."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from melora_fx.adapter.site import SiteRecord
from melora_fx.adapter.tensors import TENSORS
from melora_fx.capture.expert_layers import IN_PLACE_REMEDY
from melora_fx.capture.modules import capture_modules, matrix_names
from melora_fx.capture.packed import is_packed_linear
from melora_fx.config import MELoRAConfig
from melora_fx.names import site_name, without_wrappers
from melora_fx.patterns.node import operator_name, parameter_of
from melora_fx.patterns.products import RECURRENT, REGIONS, Products
from melora_fx.patterns.views import is_chosen_by_input, is_view, other_uses
from melora_fx.torch_private import DERIVED_SUFFIXES, is_convolution, is_experts_layer, registered

from .candidates import Candidates
from .linears import group_by_weight, name_in_model, reads_of
from .unmatched import Unmatched

_LEAVE_OUT = "leave it out of `targets`"


def uncaptured(candidates: Candidates) -> dict[str, str]:
    """Finds matrices of modules without a graph, unless other modules multiply by them in a form without a pattern."""
    unmatched = candidates.unmatched
    reasons = candidates.uncaptured.items()
    return {name: reason for name, reason in reasons if name not in unmatched or not unmatched[name].products}


def beyond_the_trace(candidates: Candidates) -> dict[str, str]:
    """Finds the matrices without a traced product because a trace stopped before its end or never read them."""
    seen = candidates.names
    read = candidates.names_read
    reasons: dict[str, str] = {}
    for capture in candidates.captures:
        if not capture.runs_own_forward:
            continue
        for name in (site_name(capture.path, matrix) for matrix in matrix_names(capture.module)):
            if name not in seen and (capture.failure or name not in read):
                reasons[name] = capture.failure or _NOT_MET
    return reasons


_NOT_MET = "no trace of its module's forward uses it: pass `example_inputs=`, or leave it out of `targets`"


def in_two_forwards(candidates: Candidates) -> dict[str, str]:
    """Finds the linears that are in the graphs of two modules."""
    reason = "two modules' forwards multiply by its weight: pass `example_inputs=`"
    uses = Counter(linear.name for linear in candidates.linears)
    return {name: reason for name, number in uses.items() if number > 1}


def otherwise_used(candidates: Candidates) -> dict[str, str]:
    """Finds the linears whose weight has another use too, which folding an adapter would change."""
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
    """Groups the `get_attr` nodes by graph and target."""
    reads: dict[tuple[fx.Graph, str], list[fx.Node]] = {}
    for node in reads_of(dict.fromkeys(graphs)):
        reads.setdefault((node.graph, str(node.target)), []).append(node)
    return reads


def without_pattern(candidates: Candidates) -> dict[str, str]:
    """Finds the matrices and stacks of matrices that graphs multiply by in a form without a pattern, and those that the
    forward of another module multiplies by.
    """
    reasons = {}
    derived = derived_weight(candidates)
    for name, used in candidates.unmatched.items():
        if name in derived or isinstance(used.owner, nn.Embedding):
            continue
        if used.products:
            products = "; ".join(dict.fromkeys(product.text for product in used.products))
            operators = {operator_name(product.node) for product in used.products}
            is_matrix = used.parameter.dim() == 2 and not operators & RECURRENT
            remedy = _PLAIN_FORM if is_matrix else _LEAVE_OUT
            if operators & REGIONS:
                remedy = "adapt it in place, without `example_inputs=`"
            if operators == {"multi_head_attention_forward"}:
                remedy = "pass `example_inputs=`"
            reasons[name] = f"{_kind(used)} in a form that has no pattern, `{products}`: {remedy}"
            if is_experts_layer(used.capture.module):
                reasons[name] = IN_PLACE_REMEDY
        elif used.has_pattern:
            reasons[name] = f"`{used.reader}` multiplies by it, not its own module: pass `example_inputs=`"
    return reasons


_PLAIN_FORM = f"multiply by the weight itself, as `F.linear(x, weight)` does, or {_LEAVE_OUT}"


def _kind(used: Unmatched) -> str:
    shape = tuple(used.parameter.shape)
    if used.parameter.dim() != 2:
        return f"a stack of matrices {shape}"
    who = "its forward" if used.capture.runs_own_forward else "the graph"
    if used.is_foreign:
        who = f"`{used.reader}`"
    return f"{who} multiplies by it, a matrix {shape},"


def rows_by_input(candidates: Candidates) -> dict[str, str]:
    """Finds the matrices of which a graph multiplies by rows that a computed value decides."""
    reasons = {}
    for capture in candidates.captures:
        products = Products(capture.module)
        for node in reads_of(capture.graphs):
            if parameter_of(node, capture.module, dim=2) is not None and _is_cut_by_input(node, products):
                name = name_in_model(capture, str(node.target))
                reasons[name] = f"the input decides by which of its rows the graph multiplies: {_LEAVE_OUT}"
    return reasons


def _is_cut_by_input(node: fx.Node, products: Products) -> bool:
    views = [user for user in node.users if is_view(user)]
    return any(
        (is_chosen_by_input(view) and any(each.is_with_weight for each in products.with_(view)))
        or _is_cut_by_input(view, products)
        for view in views
    )


def complex_weight(candidates: Candidates) -> dict[str, str]:
    """Finds the linears with complex weights."""
    reason = f"its weight is complex, and adapters are real: {_LEAVE_OUT}"
    return {linear.name: reason for linear in candidates.linears if linear.weight.dtype.is_complex}


def derived_weight(candidates: Candidates) -> dict[str, str]:
    """Finds the weights that a module computes from other parameters in each forward."""
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
    """Returns the names of the module's tensors that it computes from its parameters."""
    own, _, _ = registered(module)
    parametrized: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
    made_by_hooks = [
        name
        for name, value in vars(module).items()  # a tensor that is no parameter
        if isinstance(value, Tensor) and any(f"{name}{suffix}" in own for suffix in DERIVED_SUFFIXES)
    ]
    return [*parametrized, *made_by_hooks]


def never_called(candidates: Candidates) -> dict[str, str]:
    """Finds the linears of the model that the whole capture does not use."""
    model = candidates.model
    if not isinstance(model, nn.Module) or candidates.captured is model:
        return {}
    captures, uncaptured = capture_modules(model)
    in_place = {linear.name: linear.owner for linear in group_by_weight(captures, MELoRAConfig())}
    read = candidates.names_read
    reasons: dict[str, str] = {}
    for name in [*in_place, *uncaptured]:
        if name in candidates.names:
            continue
        if is_packed_linear(in_place.get(name, model)):
            reasons[name] = "its weight is packed: adapt it in place, without `example_inputs=`"
        elif name not in read:
            reasons[name] = _NOT_CALLED
        elif name not in candidates.unmatched:
            reasons[name] = f"the graph uses its weight in no product: {_LEAVE_OUT}"
    return reasons


_NOT_CALLED = (
    "not in the graph: never called with these `example_inputs`, or its output is not used, or it is called in a part "
    "that is exported separately"
)


def used_both_ways(candidates: Candidates) -> dict[str, str]:
    """Finds the linears whose weight is used both as stored and transposed, or as matrices of different shapes."""
    reason = (
        "the graph multiplies by this weight and by its transpose, or views it as matrices of different shapes, which "
        f"one adapter cannot serve: {_LEAVE_OUT}"
    )
    return {
        linear.name: reason
        for linear in candidates.linears
        if len({(node.weight_is_transposed, node.row_dims) for node in linear.nodes}) > 1
    }


def taken_names(candidates: Candidates) -> dict[str, str]:
    """Finds the linears whose module already has an attribute with a name that the adapter needs."""
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
    """Returns name → all reasons, for each linear that cannot be adapted."""
    reasons: dict[str, list[str]] = {}
    for obstacle in OBSTACLES:
        for name, reason in obstacle(candidates).items():
            reasons.setdefault(name, []).append(reason)
    return {name: "; ".join(found) for name, found in reasons.items()}
