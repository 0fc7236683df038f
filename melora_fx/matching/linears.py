"""The linears of captured graphs, one entry per weight."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import fx

from melora_fx.capture.graphs import Capture
from melora_fx.config import MELoRAConfig
from melora_fx.distributed.placement import misfit_of_sharded
from melora_fx.distributed.tensors import is_sharded
from melora_fx.lowering.lowerings import choose_lowering, lowering_misfit
from melora_fx.names import join_path, site_name
from melora_fx.patterns.node import CALLS, LinearNode, weight_of
from melora_fx.patterns.patterns import find_linear_nodes
from melora_fx.patterns.planned_site import PlannedSite

from .report import LinearSite


def group_by_weight(captures: Iterable[Capture], config: MELoRAConfig) -> Iterator[PlannedSite]:
    """Yields every linear of the captured graphs; all nodes of a capture with the same weight are one linear."""
    for capture in captures:
        groups: dict[str, list[LinearNode]] = {}
        for graph in capture.graphs:
            for linear in find_linear_nodes(graph, capture.module):
                if not capture.runs_own_forward or is_own(linear.parameter):
                    groups.setdefault(linear.parameter, []).append(linear)
        for parameter, nodes in groups.items():
            name = name_in_model(capture, parameter)
            yield PlannedSite(name, capture, parameter, tuple(nodes), weight_of(capture.module, parameter), config)


def is_own(parameter: str) -> bool:
    """Returns whether a captured module holds the parameter itself, instead of a module below it."""
    return "." not in parameter


def name_in_model(capture: Capture, parameter: str) -> str:
    """Returns the name of the site whose weight is at the path `parameter` below the captured module."""
    owner, _, attribute = parameter.rpartition(".")
    return site_name(join_path(capture.path, owner), attribute)


def reads_of(graphs: Iterable[fx.Graph]) -> Iterator[fx.Node]:
    """Yields the `get_attr` nodes."""
    for graph in graphs:
        yield from graph.find_nodes(op="get_attr")


def misfit(planned: PlannedSite, config: MELoRAConfig, *, is_head: bool) -> str | None:
    """Returns why this configuration cannot adapt this linear, or None."""
    configured = replace(planned, config=config)
    reason = config.misfit(*planned.shape, is_head=is_head) or lowering_misfit(configured)
    if reason or not is_sharded(planned.weight):
        return reason
    lowering = choose_lowering(configured)
    is_linear = lowering is not None and all(node.operands and not node.weight_is_transposed for node in planned.nodes)
    return misfit_of_sharded(planned.weight, config, lowering.name if lowering else "", is_linear=is_linear)


def names_unused(planned: Iterable[PlannedSite]) -> set[str]:
    """Returns the names of linears that no output depends on: an adapter would change nothing and get no gradient."""
    used: dict[fx.Graph, set[fx.Node]] = {}
    names = set()
    for site in planned:
        graph = site.capture.graph
        if site.capture.runs_own_forward:  # a trace shows products, but not everything computed from them
            continue
        if graph not in used:
            used[graph] = _nodes_used(graph)
        if not any(linear.node in used[graph] for linear in site.nodes):
            names.add(site.name)
    return names


def _nodes_used(graph: fx.Graph) -> set[fx.Node]:
    """Returns the nodes on which an output or a change in place depends."""
    used = set[fx.Node]()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in used or (node.op in CALLS and node.is_impure()):
            used |= {node, *node.all_input_nodes}
    return used


def describe(planned: PlannedSite, *, is_used: bool = True) -> LinearSite:
    """Returns the public LinearSite of a planned site."""
    in_features, out_features = planned.shape
    lowering = choose_lowering(planned)
    return LinearSite(
        name=planned.name,
        in_features=in_features,
        out_features=out_features,
        pattern=planned.pattern,
        lowering=lowering.shown_as if lowering else "-",
        num_parameters=planned.num_experts * planned.config.num_parameters(in_features, out_features),
        shared_with=planned.shared_with,
        num_experts=planned.num_experts,
        is_used=is_used,
    )
