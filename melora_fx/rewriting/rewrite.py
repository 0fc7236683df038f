"""Rewrites the linear nodes of a model into frozen base + MELoRA subgraphs.

`melora_fx/patterns` decides what is inserted after each node. This file does the rest: it freezes the base, adds the
adapters' tensors to the modules, and refuses what cannot be adapted.
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
    """Adds an adapter to each linear that `targets` names, freezes everything else, and returns the adapted model.

    Initially the outputs are those of the base, bit for bit. Errors are raised before anything is changed. Warns about
    linears that "all-linear" or a callable chooses but that cannot be adapted.

    Args:
        model: an nn.Module, which is changed in place and returned, or an ExportedProgram, which becomes a GraphModule.
        targets: a name or list of names; an ordered mapping from name to MELoRAConfig, or to None to leave out a
            linear or everything below a module (the first match wins); or a callable (name, module) -> bool. A name
            matches a site if it equals the site's name or a dotted suffix of it. With `* ? [` a name is a glob, after
            `re:` a regular expression; both match whole names. "all-linear" is every linear except heads and modules
            kept trainable.
        config: the adapter's configuration, if `targets` has none for the linear.
        example_inputs: a dict of keyword arguments or a tuple of positional ones. If passed, the whole model is
            captured with `torch.export`, and a GraphModule is returned that shares the model's parameters.
        dynamic_axes: the axes of that graph's inputs that may vary: "auto" for batch and sequence; or
            input name → {axis: name}, with every other axis fixed.
        keep_trainable: names, matched as in `targets`, of modules and parameters that stay trainable and are saved with
            the adapter. A module is saved with its buffers.

    Raises:
        ValueError, TypeError: if a name matches nothing, the blocks do not divide a linear's features, a weight would
            be both adapted and trained, or an argument is malformed.
        MELoRAError: if the model is already rewritten, compiled or wrapped for several processes, or cannot be
            captured, or if a linear that `targets` names one by one cannot be adapted.
    """
    plan = make_plan(model, targets, config, example_inputs, dynamic_axes, keep_trainable)
    rewritten, kept = plan.model, plan.kept
    _refuse(plan)
    if plan.missed:
        missed = ", ".join(f"`{name}` ({plan.unsuitable[name]})" for name in plan.missed)
        warnings.warn(f"`rewrite` leaves {len(plan.missed)} linears alone: {missed}", stacklevel=2)
    if is_exported(rewritten):  # a user's exported module is planned unchanged first, so that errors precede changes
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
    root_mark(rewritten).patches.take_all_off(rewritten)  # a Trainer's patches, left after a part was folded
    vars(rewritten)[ROOT_MARK] = mark
    if not isinstance(rewritten, fx.GraphModule):  # only the graph itself reads a whole graph's weights
        watch(rewritten)
    attach(rewritten)
    watch_optimizers(rewritten)
    return rewritten


def _refuse(plan: Plan) -> None:
    """Raises an error that lists all offenders of one kind if `plan` has requests that cannot be met."""
    if plan.misfits:
        raise ValueError("\n".join(f"`{name}`: {reason}" for name, reason in plan.misfits.items()))
    if plan.refused:
        raise MELoRAError("\n".join(f"`{name}` cannot be adapted: {reason}" for name, reason in plan.refused.items()))
    if not plan.sites:
        raise MELoRAError("no linear can be adapted:\n" + "\n".join(f"`{n}`: {r}" for n, r in plan.unsuitable.items()))
    both = [site.name for site in plan.sites if any(keeps_weight(name, site.name) for name in plan.kept)]
    if both:
        raise ValueError(
            f"`keep_trainable` and `targets` both name {', '.join(map(repr, both))}: either train it or adapt it; "
            f"leave it out with a mapping, `targets={{{both[0]!r}: None, …}}`"
        )
    if lines := trained_bases(plan.model, plan.kept, {site.name: site.weight for site in plan.sites}):
        raise ValueError(
            "\n".join(lines)
            + "\neither train it or adapt it, or give one of the two a copy of the weight before `rewrite`"
        )


def _requires_grad(model: nn.Module) -> dict[str, bool]:
    """Maps every name of every parameter to its `requires_grad`."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {without_wrappers(name): parameter.requires_grad for name, parameter in parameters}


def _by_capture(sites: list[PlannedSite]) -> list[tuple[Capture, list[PlannedSite]]]:
    """Groups the sites by capture: (capture, its sites) for each capture that has any."""
    groups: dict[int, tuple[Capture, list[PlannedSite]]] = {}
    for site in sites:
        groups.setdefault(id(site.capture), (site.capture, []))[1].append(site)
    return list(groups.values())


def _insert_sites(graph: fx.Graph, sites: list[PlannedSite]) -> list[SiteRecord]:
    """Adds the adapters' tensors to the weights' owners and the adapters' nodes to the graph; returns the records.

    The last node comes first: if one linear feeds another, the later adapter still reads the plain output when it is
    inserted, and gets the adapted output together with all other users.
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
    """Adds the tensors of a site to the weight's owner, and returns the site's record."""
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
