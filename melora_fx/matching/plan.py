"""Plans a rewrite: captures the model, finds linears and their obstacles, selects by `targets`. Changes nothing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn
from torch.export import ExportedProgram

from melora_fx.config import MELoRAConfig
from melora_fx.errors import MELoRAError
from melora_fx.names import get_attribute, join_path, site_of, unwrap
from melora_fx.patterns.planned_site import PlannedSite
from melora_fx.shared_memory import sharing_parameters
from melora_fx.whole_capture.dynamic_axes import DynamicAxes, refuse_malformed_axes
from melora_fx.whole_capture.example_inputs import ExampleInputs
from melora_fx.whole_capture.whole_model import capture_whole, from_program

from .candidates import find_candidates
from .heads import find_heads
from .keep_trainable import keeps_weight, resolve_kept
from .linears import misfit
from .obstacles import find_obstacles
from .other_products import find_other_products
from .refusals import refuse_distributed, refuse_lazy, refuse_partitioned, refuse_replaced_linear, refuse_rewritten
from .targets import TargetSpec, asks_for_all, names_one_by_one, resolve_targets


@dataclass(frozen=True)
class Plan:
    """Everything that `match` reports and `rewrite` applies. The dicts map names to reasons.

    Attributes:
        model: the model that the sites belong to: the one passed, or its whole capture.
        sites: the linears to adapt, with their configurations.
        untargeted: the linears that could be adapted and that `targets` does not select.
        refused: linears that cannot be adapted although `targets` names them.
        unsuitable: the other linears that cannot be adapted.
        misfits: selected linears that could be adapted with other arguments.
        others: parameters that take part in products and are no linears.
        missed: unsuitable linears that `targets` selects among others, as "all-linear" does.
        heads: linears that "all-linear" leaves out as heads.
        kept: modules and parameters that stay trainable.
    """

    model: nn.Module
    sites: list[PlannedSite]
    untargeted: list[PlannedSite]
    refused: dict[str, str]
    unsuitable: dict[str, str]
    misfits: dict[str, str]
    others: dict[str, str]
    missed: tuple[str, ...]
    heads: tuple[str, ...]
    kept: tuple[str, ...]


def make_plan(
    model: nn.Module | ExportedProgram,
    targets: TargetSpec,
    config: MELoRAConfig,
    example_inputs: ExampleInputs | None = None,
    dynamic_axes: DynamicAxes = "auto",
    keep_trainable: str | Sequence[str] = (),
) -> Plan:
    """Captures, matches and selects, without changing `model`. Raises the errors of `match` and `resolve_kept`."""
    _refuse(model, config)
    refuse_malformed_axes(dynamic_axes)
    is_graph = isinstance(model, ExportedProgram | fx.GraphModule)
    if dynamic_axes != "auto" and (example_inputs is None or is_graph):
        raise ValueError(
            "`dynamic_axes` is for whole captures of models that are not graphs yet: pass `example_inputs` too"
        )
    captured = _captured(model, example_inputs, dynamic_axes)
    candidates = find_candidates(model, captured, config)
    obstacles = find_obstacles(candidates)
    found = {linear.name: linear for linear in candidates.linears if linear.name not in obstacles}
    others = {name: reason for name, reason in find_other_products(candidates).items() if name not in obstacles}
    found = _with_shared_names(found, captured)
    original = model if isinstance(model, nn.Module) else captured
    owners = {name: _owner(original, name) for name in [*found, *obstacles]}
    kept = resolve_kept(captured, keep_trainable)
    heads = find_heads(original, owners)
    left_out = heads | {name for name in owners if any(keeps_weight(each, name) for each in kept)}
    chosen = resolve_targets(targets, config, owners, left_out, original, others)
    asked_for = {name for name in obstacles if name in chosen and names_one_by_one(targets, name, left_out)}
    misfits = {
        name: reason
        for name in found
        if name in chosen and (reason := misfit(found[name], chosen[name], is_head=name in heads))
    }
    misfits |= _half_adapted(found, chosen)
    return Plan(
        model=captured,
        sites=[
            replace(planned, config=chosen[name])
            for name, planned in found.items()
            if name in chosen and name not in misfits
        ],
        untargeted=[planned for name, planned in found.items() if name not in chosen],
        refused={name: reason for name, reason in obstacles.items() if name in asked_for},
        unsuitable={name: reason for name, reason in obstacles.items() if name not in asked_for},
        misfits=misfits,
        others=others,
        missed=tuple(name for name in obstacles if name in chosen and name not in asked_for),
        heads=tuple(name for name in owners if name in heads - chosen.keys()) if asks_for_all(targets) else (),
        kept=kept,
    )


def _refuse(model: nn.Module | ExportedProgram, config: MELoRAConfig) -> None:
    """Raises TypeError for arguments of other types, and MELoRAError for models that are refused as a whole."""
    if not isinstance(config, MELoRAConfig):
        raise TypeError(f"`config` must be a MELoRAConfig, got {config!r}")
    if isinstance(model, ExportedProgram):
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module or an ExportedProgram, got {type(model).__name__}")
    refuse_distributed(model)
    if unwrap(model) is not model:
        raise MELoRAError("the model is already compiled: `rewrite` it first, then call `torch.compile`")
    refuse_rewritten(model)
    refuse_lazy(model)
    refuse_partitioned(model, "rewrite")
    refuse_replaced_linear()


def _captured(
    model: nn.Module | ExportedProgram, example_inputs: ExampleInputs | None, dynamic_axes: DynamicAxes
) -> nn.Module:
    """Returns the model whose graphs are read: `model` itself, or its whole capture."""
    if isinstance(model, ExportedProgram):
        return from_program(model)
    if example_inputs is None or isinstance(model, fx.GraphModule):
        return model
    return capture_whole(model, example_inputs, dynamic_axes)


def _with_shared_names(found: dict[str, PlannedSite], model: nn.Module) -> dict[str, PlannedSite]:
    """Returns the linears with the other names that `model` has for their weights."""
    sharing = sharing_parameters(model)
    named = {}
    for name, planned in found.items():
        others = sharing.get(join_path(planned.capture.path, planned.parameter), ())
        named[name] = replace(planned, shared_with=tuple(site_of(other) for other in others))
    return named


def _half_adapted(found: Mapping[str, PlannedSite], chosen: Collection[str]) -> dict[str, str]:
    """Finds the chosen linears whose weight a forward multiplies by under another name that is not chosen."""
    reasons = {}
    for name in chosen:
        for other in found[name].shared_with if name in found else ():
            if other in found and other not in chosen and _is_alias(found[other], found[name]):
                forward = f"`{type(found[other].owner).__name__}.forward`"
                reasons[name] = f"{forward} multiplies by its weight as `{other}`: name both in `targets`"
    return reasons


def _is_alias(other: PlannedSite, linear: PlannedSite) -> bool:
    """Returns whether a module's own forward multiplies by the weight of `linear` under the name of `other`."""
    return other.capture.runs_own_forward and other.weight is linear.weight


def _owner(model: nn.Module, name: str) -> nn.Module:
    """Returns the module that owns the weight of the site `name`: the site itself, or the parent of the parameter."""
    owner = get_attribute(model, name)
    return owner if isinstance(owner, nn.Module) else model.get_submodule(name.rpartition(".")[0])
