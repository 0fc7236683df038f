"""The dry run: which linears of a model `rewrite` would adapt, and why not the others. Changes nothing."""

from dataclasses import dataclass, replace

from torch import fx, nn
from torch.export import ExportedProgram

from melora_fx.capture.example_inputs import ExampleInputs
from melora_fx.capture.modules import capture_modules
from melora_fx.capture.whole_model import capture_whole, from_program
from melora_fx.config import MELoRAConfig
from melora_fx.errors import MELoRAError
from melora_fx.names import get_attribute, shared_parameters, unwrap

from .linears import PlannedSite, group_by_weight, other_names
from .obstacles import BOTH_WAYS, derived_weights, never_called, otherwise_used, unmatched_stacks
from .refusals import refuse_distributed, refuse_rewritten
from .targets import TargetSpec, is_classification_head, names_one_by_one, resolve_targets


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
    found, split_up = group_by_weight(captures, config)
    reasons |= split_up | otherwise_used(found)
    shared = shared_parameters(captured)
    found = {name: replace(planned, shared_with=other_names(shared, planned)) for name, planned in found.items()}
    reasons |= unmatched_stacks(captures, found)
    if isinstance(model, nn.Module):
        reasons |= derived_weights(model)
    if captured is not model and isinstance(model, nn.Module):
        reasons |= never_called(model, found, config)
    reasons |= {name: BOTH_WAYS for name, planned in found.items() if planned.is_used_both_ways}
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
