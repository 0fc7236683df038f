"""The dry run: which linears of a model `rewrite` would adapt, and why not the others. Changes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from melora_fx.adapter.tensors import num_matrices
from melora_fx.capture.modules import Capture, capture_modules, derived_weights, join_path, site_name, without_wrappers
from melora_fx.capture.packed import is_packed_linear
from melora_fx.capture.whole_model import capture_whole, from_program
from melora_fx.config import MELoRAConfig
from melora_fx.errors import MELoRAError
from melora_fx.lowering.lower import choose_lowering, lowering_misfit
from melora_fx.patterns.experts import ExpertNode, find_expert_nodes, products_with
from melora_fx.patterns.linear import LinearNode, find_linear_nodes, get_attribute, other_uses, weight_of
from melora_fx.rewriting.module import refuse_distributed, refuse_rewritten, unwrap

from .report import LinearSite, MatchReport
from .targets import TargetSpec, is_classification_head, names_one_by_one, resolve_targets

ExampleInputs = Mapping[str, Any] | Sequence[Any]


def match(
    model: nn.Module | ExportedProgram,
    targets: TargetSpec,
    config: MELoRAConfig = MELoRAConfig(),
    *,
    example_inputs: ExampleInputs | None = None,
) -> MatchReport:
    """What `rewrite` with the same arguments would do, without doing it.

    Args:
        model, targets, config, example_inputs: as in `rewrite`.

    Raises:
        ValueError, TypeError: for `targets` that match nothing or have no accepted form.
        MELoRAError: where the model cannot be captured.
    """
    plan = make_plan(model, targets, config, example_inputs)
    return MatchReport(
        sites=tuple(planned.describe() for planned in plan.sites),
        untargeted=tuple(planned.describe() for planned in plan.untargeted),
        skipped=tuple((plan.refused | plan.unsuitable | plan.misfits).items()),
    )


@dataclass(frozen=True)
class PlannedSite:
    """One weight and every node that multiplies by it. `parameter` is its path below the captured module.

    `shared_with`: the names of other parameters of the model that are the same weight.
    """

    name: str
    capture: Capture
    parameter: str
    nodes: tuple[LinearNode, ...]
    weight: torch.Tensor
    config: MELoRAConfig
    shared_with: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features) of the weight, or of each matrix in a stack."""
        out_features, in_features = self.weight.shape[-2:]
        return (out_features, in_features) if self.nodes[0].weight_is_transposed else (in_features, out_features)

    @property
    def num_experts(self) -> int:
        """How many matrices the weight is a stack of; 1 for a matrix."""
        return num_matrices(self.weight)

    @property
    def owner(self) -> nn.Module:
        """The module that holds the weight."""
        return get_attribute(self.capture.module, self.parameter.rpartition(".")[0])

    @property
    def is_used_both_ways(self) -> bool:
        """Whether some nodes take the weight as (out, in) and others as (in, out)."""
        return len({node.weight_is_transposed for node in self.nodes}) > 1

    def describe(self) -> LinearSite:
        """The public view of this site."""
        in_features, out_features = self.shape
        num_parameters = self.num_experts * self.config.num_parameters(in_features, out_features)
        return LinearSite(
            self.name, in_features, out_features, self._pattern, self.lowering, num_parameters, self.shared_with,
            self.num_experts,
        )  # fmt: skip

    @property
    def lowering(self) -> str:
        """How the site is computed in training."""
        return choose_lowering(self.config, self.weight, self.nodes, self.capture.module)

    def misfit(self, config: MELoRAConfig) -> str | None:
        """Why this configuration cannot adapt this linear, or None."""
        return config.misfit(*self.shape) or lowering_misfit(config, self.weight, self.nodes, self.capture.module)

    @property
    def _pattern(self) -> str:
        kind = type(self.owner).__name__
        is_module = kind in ("Linear", "Conv1D") and self.capture.module is self.owner
        return kind if is_module else self.nodes[0].pattern


@dataclass(frozen=True)
class Plan:
    """All that `match` reports and `rewrite` applies.

    `model`: the model that the sites belong to: the one given, or the whole-graph capture of it.
    Name → why: `refused` are linears that cannot be adapted although `targets` names them, `unsuitable` the others that
    cannot, `misfits` those that only this configuration cannot adapt.
    """

    model: nn.Module
    sites: list[PlannedSite]
    untargeted: list[PlannedSite]
    refused: dict[str, str]
    unsuitable: dict[str, str]
    misfits: dict[str, str]


def make_plan(
    model: nn.Module | ExportedProgram, targets: TargetSpec, config: MELoRAConfig, example_inputs: ExampleInputs | None
) -> Plan:
    """Captures, matches and chooses; nothing of `model` is changed. Errors as in `match`."""
    if not isinstance(config, MELoRAConfig):
        raise TypeError(f"`config` must be a MELoRAConfig, got {config!r}")
    if not isinstance(model, nn.Module | ExportedProgram):
        raise TypeError(f"`model` must be an nn.Module or an ExportedProgram, got {type(model).__name__}")
    if isinstance(model, nn.Module):
        if unwrap(model) is not model:
            raise MELoRAError("the model is already compiled: `rewrite` it first, then call `torch.compile`")
        refuse_distributed(model, "rewrite")
        refuse_rewritten(model)
    captured = _captured(model, example_inputs)
    captures, reasons = capture_modules(captured)
    found, split_up = _group_by_weight(captures, config)
    reasons |= split_up | _otherwise_used(found)
    shared = shared_parameters(captured)
    found = {name: replace(planned, shared_with=_others(shared, planned)) for name, planned in found.items()}
    reasons |= _unmatched_stacks(captures, found)
    if isinstance(model, nn.Module):
        reasons |= derived_weights(model)
    if captured is not model and isinstance(model, nn.Module):
        reasons |= _never_called(model, found, config)
    reasons |= {name: _BOTH_WAYS for name, planned in found.items() if planned.is_used_both_ways}
    found = {name: planned for name, planned in found.items() if name not in reasons}
    original = model if isinstance(model, nn.Module) else captured
    owners = {name: _owner(original, name) for name in [*found, *reasons]}
    chosen = resolve_targets(targets, config, owners, _output_names(original, found))
    sites, untargeted, misfits = [], [], {}
    for name, planned in found.items():
        if name not in chosen:
            untargeted.append(planned)
        elif reason := planned.misfit(chosen[name]):
            misfits[name] = reason
        else:
            sites.append(replace(planned, config=chosen[name]))
    refused = {name: reason for name, reason in reasons.items() if name in chosen and names_one_by_one(targets, name)}
    unsuitable = {name: reason for name, reason in reasons.items() if name not in refused}
    return Plan(captured, sites, untargeted, refused, unsuitable, misfits)


def _unmatched_stacks(captures: list[Capture], found: Mapping[str, PlannedSite]) -> dict[str, str]:
    """The stacks of matrices that graphs multiply by in a form without a pattern."""
    reasons = {}
    for capture in captures:
        for node in capture.graph.nodes:
            parameter = get_attribute(capture.module, str(node.target)) if node.op == "get_attr" else None
            if not isinstance(parameter, nn.Parameter) or parameter.dim() != 3 or min(parameter.shape) == 1:
                continue
            products = products_with(node)
            owner, _, attribute = str(node.target).rpartition(".")
            name = site_name(join_path(capture.path, owner), attribute)
            if products and name not in found:
                kind = f"a stack of matrices {tuple(parameter.shape)}"
                reasons[name] = f"{kind} in a form that has no pattern: `{', '.join(products)}`"
    return reasons


def _never_called(model: nn.Module, found: Mapping[str, PlannedSite], config: MELoRAConfig) -> dict[str, str]:
    """The linears that the model has and that the whole capture does not use."""
    in_place, _ = _group_by_weight(capture_modules(model)[0], config)
    reason = "not in the graph: never called with these `example_inputs`, or called in a part that is exported apart"
    packed = "its weight is packed: it is adapted in place, without `example_inputs=`"
    return {
        name: packed if is_packed_linear(planned.owner) else reason
        for name, planned in in_place.items()
        if name not in found
    }


def _otherwise_used(found: Mapping[str, PlannedSite]) -> dict[str, str]:
    """The linears whose weight has another use too: beside that, an adapter could not be folded."""
    reads: dict[tuple[fx.Graph, str], list[fx.Node]] = {}
    for graph in {planned.capture.graph for planned in found.values()}:
        for node in graph.find_nodes(op="get_attr"):
            reads.setdefault((graph, str(node.target)), []).append(node)
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


def shared_parameters(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """For each parameter of `model`, by id, all names it goes by; a module used in several places counts once."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            names.setdefault(id(parameter), []).append(without_wrappers(name).removesuffix(".weight"))
    return {key: tuple(value) for key, value in names.items()}


def _others(shared: Mapping[int, tuple[str, ...]], planned: PlannedSite) -> tuple[str, ...]:
    return tuple(name for name in shared.get(id(planned.weight), ()) if name != planned.name)


_BOTH_WAYS = "the graph multiplies by this weight and by its transpose: one adapter cannot serve both"


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The module that owns the weight of the site `name`: the site itself, or what stands before the parameter."""
    owner = get_attribute(model, name)
    return owner if isinstance(owner, nn.Module) else model.get_submodule(name.rpartition(".")[0])


def _captured(model: nn.Module | ExportedProgram, example_inputs: ExampleInputs | None) -> nn.Module:
    if isinstance(model, ExportedProgram):
        return from_program(model)
    if example_inputs is None or isinstance(model, fx.GraphModule):
        return model
    return capture_whole(model, example_inputs)


def _group_by_weight(captures: list[Capture], config: MELoRAConfig) -> tuple[dict[str, PlannedSite], dict[str, str]]:
    """Every linear of the captured graphs by name; a weight that several nodes multiply by is one site.

    Returns:
        the linears, and those that stand in two graphs, with the reason why they cannot be adapted.
    """
    found: dict[str, PlannedSite] = {}
    split_up: dict[str, str] = {}
    for capture in captures:
        groups: dict[str, list[LinearNode]] = {}
        for linear in _find_nodes(capture):
            groups.setdefault(linear.parameter, []).append(linear)
        for parameter, nodes in groups.items():
            owner, _, attribute = parameter.rpartition(".")
            name = site_name(join_path(capture.path, owner), attribute)
            weight = weight_of(capture.module, parameter)
            if name in found:
                split_up[name] = "two modules' forwards multiply by its weight: pass `example_inputs=`"
            found[name] = PlannedSite(name, capture, parameter, tuple(nodes), weight, config)
    return found, split_up


def _find_nodes(capture: Capture) -> list[LinearNode]:
    """The products with matrices and with stacks of them, in the order of the graph."""
    found = [
        *find_linear_nodes(capture.graph, capture.module),
        *find_expert_nodes(capture.graph, capture.module),
    ]
    position = {node: index for index, node in enumerate(capture.graph.nodes)}
    return sorted(found, key=lambda linear: position[linear.node])


def _output_names(model: nn.Module, found: dict[str, PlannedSite]) -> frozenset[str]:
    """What "all-linear" leaves out: output embeddings, by the model's own word where it has one, and heads."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    embeddings = get_output_embeddings() if callable(get_output_embeddings) else None
    weight = getattr(embeddings, "weight", None)
    return frozenset(
        name
        for name, planned in found.items()
        if planned.weight is weight or name.split(".")[-1] == "lm_head" or is_classification_head(name)
    )
