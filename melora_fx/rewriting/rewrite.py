"""Rewrites the linear nodes of a model into frozen base + MELoRA subgraphs.

`melora_fx/patterns` says what is inserted behind each node; here is everything around it: what is frozen, which tensors
the modules get, and what is refused.
"""

import warnings
from collections.abc import Sequence
from typing import TypeVar, overload

from torch import fx, nn
from torch.export import ExportedProgram

from melora_fx.adapter.site import SiteRecord
from melora_fx.adapter.tensors import DROPOUT, SCALING, AdapterTensors
from melora_fx.capture.graphs import Capture
from melora_fx.capture.packed import device_of
from melora_fx.config import MELoRAConfig
from melora_fx.distributed.placement import lay
from melora_fx.distributed.tensors import is_sharded
from melora_fx.errors import MELoRAError
from melora_fx.live.foreseen import foresee_linears
from melora_fx.lowering.lowerings import choose_lowering
from melora_fx.matching.keep_trainable import free, keeps_weight, trained_bases
from melora_fx.matching.plan import Plan, make_plan
from melora_fx.matching.targets import TargetSpec
from melora_fx.names import without_wrappers
from melora_fx.patterns.adapter_nodes import adapter_dtype
from melora_fx.patterns.node import LinearNode
from melora_fx.patterns.planned_site import PlannedSite
from melora_fx.whole_capture.dynamic_axes import DynamicAxes
from melora_fx.whole_capture.example_inputs import ExampleInputs
from melora_fx.whole_capture.whole_model import is_exported, make_trainable

from .changes import record_values
from .hugging_face import attach
from .marks import ROOT_MARK, RootMark, root_mark
from .module import install
from .own_forward import install_own_forward
from .stale_optimizer import watch_optimizers
from .watch import watch

_Model = TypeVar("_Model", bound=nn.Module)


@overload
def rewrite(
    model: _Model,
    targets: TargetSpec,
    config: MELoRAConfig = ...,
    *,
    example_inputs: None = None,
    dynamic_axes: DynamicAxes = ...,
    keep_trainable: str | Sequence[str] = ...,
) -> _Model: ...
@overload
def rewrite(
    model: nn.Module | ExportedProgram,
    targets: TargetSpec,
    config: MELoRAConfig = ...,
    *,
    example_inputs: ExampleInputs | None = ...,
    dynamic_axes: DynamicAxes = ...,
    keep_trainable: str | Sequence[str] = ...,
) -> nn.Module: ...
def rewrite(
    model: nn.Module | ExportedProgram,
    targets: TargetSpec,
    config: MELoRAConfig = MELoRAConfig(),
    *,
    example_inputs: ExampleInputs | None = None,
    dynamic_axes: DynamicAxes = "auto",
    keep_trainable: str | Sequence[str] = (),
) -> nn.Module:
    """The model with an adapter beside each linear that `targets` names, and everything else frozen.

    The output is at first that of the base, bit for bit. Errors come before anything is changed.

    Args:
        model: an nn.Module is changed in place and returned; an ExportedProgram gives a GraphModule.
        targets: a name or list of names; an ordered mapping of name to MELoRAConfig, or to None to leave a linear
            or all below a module alone (first match wins); or a callable (name, module) -> bool. A name matches a site
            when equal to it or to its dotted suffix; with `* ? [` it is a glob on the whole name; after `re:` a regular
            expression for the whole name; "all-linear" is every linear but heads and what is kept trainable.
        config: the adapter's configuration, where `targets` gives none of its own.
        example_inputs: captures the whole model by `torch.export` and returns a GraphModule that shares the model's
            parameters: a dict of keyword arguments or a tuple of positional ones.
        dynamic_axes: of that graph's inputs: "auto" frees batch and sequence; or input name → {axis: name}, every other
            axis fixed.
        keep_trainable: names, as in `targets`, of modules and parameters that stay trainable and are saved with the
            adapter, a module with its buffers.

    Raises:
        ValueError, TypeError: for a name that matches nothing, features that the blocks do not divide, or a weight that
            would be both adapted and trained.
        MELoRAError: for a model already rewritten or compiled, one that cannot be captured, or a named linear that
            cannot be adapted.
    """
    plan = make_plan(model, targets, config, example_inputs, dynamic_axes, keep_trainable)
    rewritten, kept = plan.model, plan.kept
    _refuse(plan)
    if plan.missed:
        missed = ", ".join(f"`{name}` ({plan.unsuitable[name]})" for name in plan.missed)
        warnings.warn(f"`rewrite` leaves {len(plan.missed)} linears alone: {missed}", stacklevel=2)
    if is_exported(rewritten):  # the user's own, planned as it is so that errors come before any change
        assert isinstance(rewritten, fx.GraphModule)
        plan = make_plan(make_trainable(rewritten), targets, config, keep_trainable=keep_trainable)
    names = tuple(site.name for site in plan.sites)
    mark = RootMark(_requires_grad(rewritten), kept, names, record_values(rewritten, names))
    rewritten.requires_grad_(False)
    free(rewritten, kept)
    for capture, sites in _by_capture(plan.sites):
        if capture.runs_own_forward:
            install_own_forward(capture.module, [_add_site(site) for site in sites], capture.path)
            for site in sites:
                foresee_linears(site.owner, site.nodes, site.weight)
        else:
            install(capture.module, capture.graph, _insert_sites(capture.graph, sites), capture.path)
    root_mark(rewritten).patches.take_all_off(rewritten)  # a Trainer's, which a fold of a part has left
    vars(rewritten)[ROOT_MARK] = mark
    if not isinstance(rewritten, fx.GraphModule):  # one graph has no other readers
        watch(rewritten)
    attach(rewritten)
    watch_optimizers(rewritten)
    return rewritten


def _refuse(plan: Plan) -> None:
    """Raises for what was asked for and cannot be done; all offenders at once."""
    if plan.misfits:
        raise ValueError("\n".join(f"`{name}`: {reason}" for name, reason in plan.misfits.items()))
    if plan.refused:
        raise MELoRAError("\n".join(f"`{name}` cannot be adapted: {reason}" for name, reason in plan.refused.items()))
    if not plan.sites:
        raise MELoRAError("no linear can be adapted:\n" + "\n".join(f"`{n}`: {r}" for n, r in plan.unsuitable.items()))
    both = [site.name for site in plan.sites if any(keeps_weight(name, site.name) for name in plan.kept)]
    if both:
        raise ValueError(
            f"`keep_trainable` and `targets` both name {', '.join(map(repr, both))}: train or adapt it; "
            f"a mapping leaves it out, `targets={{{both[0]!r}: None, …}}`"
        )
    if lines := trained_bases(plan.model, plan.kept, {site.name: site.weight for site in plan.sites}):
        raise ValueError(
            "\n".join(lines) + "\ntrain it or adapt it, or give one of the two a copy of the weight before `rewrite`"
        )


def _requires_grad(model: nn.Module) -> dict[str, bool]:
    """Of each parameter under each of its names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {without_wrappers(name): parameter.requires_grad for name, parameter in parameters}


def _by_capture(sites: list[PlannedSite]) -> list[tuple[Capture, list[PlannedSite]]]:
    """Each capture that has sites, with these."""
    groups: dict[int, tuple[Capture, list[PlannedSite]]] = {}
    for site in sites:
        groups.setdefault(id(site.capture), (site.capture, []))[1].append(site)
    return list(groups.values())


def _insert_sites(graph: fx.Graph, sites: list[PlannedSite]) -> list[SiteRecord]:
    """Adds the adapters' tensors to the weights' owners and their nodes to the graph.

    Last node first: where one linear feeds another, the later adapter's input is still the plain output then, and
    becomes the adapted one with all its other users.
    """
    records = []
    insertions: dict[fx.Node, tuple[LinearNode, SiteRecord, PlannedSite]] = {}
    for site in sites:
        record = _add_site(site)
        records.append(record)
        insertions |= {linear.node: (linear, record, site) for linear in site.nodes}
    for node in reversed(list(graph.nodes)):
        if node in insertions:
            linear, record, site = insertions[node]
            assert linear.matched_by, "it was found by the walk"
            linear.matched_by.insert(graph, linear, record, site.weight)
    return records


def _add_site(site: PlannedSite) -> SiteRecord:
    """The record of a site whose tensors have been added to the weight's owner."""
    record = _record_of(site)
    _add_tensors(site, record)
    return record


def _record_of(site: PlannedSite) -> SiteRecord:
    lowering = choose_lowering(site)
    assert lowering, "a site without one is a misfit"
    return SiteRecord(
        parameter=site.parameter,
        config=site.config,
        pattern=site.pattern,
        weight_is_transposed=site.nodes[0].weight_is_transposed,
        lowering=lowering.name,
        is_aten=site.is_aten,
        row_dims=site.nodes[0].row_dims,
    )


def _add_tensors(site: PlannedSite, record: SiteRecord) -> None:
    """Adds the adapter's parameters, its scaling and its dropout to the module that owns the weight."""
    owner = site.owner
    fresh = AdapterTensors.new(
        site.config,
        *site.shape,
        num_experts=site.num_experts,
        device=device_of(owner, site.weight),
        dtype=adapter_dtype(site.weight),
    )
    scaling = fresh.scaling()
    if is_sharded(site.weight):
        fresh = AdapterTensors(site.config, lay(fresh.lora_a, site.weight), lay(fresh.lora_b, site.weight))
        scaling = lay(scaling, site.weight)
    for kind, tensor in fresh.factors.items():
        owner.register_parameter(record.attribute(kind), nn.Parameter(tensor))
    owner.register_buffer(record.attribute(SCALING), scaling, persistent=False)
    if site.config.dropout:
        owner.add_module(record.attribute(DROPOUT), nn.Dropout(site.config.dropout).train(owner.training))
