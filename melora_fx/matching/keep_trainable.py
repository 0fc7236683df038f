"""Resolves the modules and parameters that `keep_trainable` names, and refuses those that cannot be trained."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from melora_fx.distributed.tensors import own_part
from melora_fx.names import join_path, site_of, without_wrappers
from melora_fx.shared_memory import overlap, span_of

from .targets import name_matches, nearest


def resolve_kept(model: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the modules and parameters that `patterns` match, without those below another of them.

    Raises:
        TypeError: if `patterns` is neither a name nor a list of names.
        ValueError: if a name matches no parameter and no module with parameters or buffers, or matches a quantised one.
    """
    if not isinstance(patterns, str | Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"`keep_trainable` must be a name or a list of names, got {patterns!r}")
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    parameters = {name: list(module.parameters()) for name, module in _modules(model) if name and _has_tensors(module)}
    parameters |= {name: [parameter] for name, parameter in _parameters(model)}
    names = list(parameters)
    kept: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in names if name_matches(pattern, name)]
        if not hits:
            raise ValueError(f"`keep_trainable`: {pattern!r} matches nothing; nearest: {nearest(pattern, names)}")
        kept.update(dict.fromkeys(hits))
    for name in kept:
        if not all(_can_be_trained(parameter) for parameter in parameters[name]):
            raise ValueError(
                f"`keep_trainable`: {name!r} is quantised and cannot be trained: leave it out of the quantisation "
                "(`modules_to_not_convert`, `llm_int8_skip_modules`), or adapt it"
            )
    return tuple(name for name in kept if not any(name != other and is_within(name, other) for other in kept))


def free(model: nn.Module, kept: Collection[str]) -> None:
    """Makes the modules and parameters `kept` trainable."""
    for _, parameter in _kept_parameters(model, kept):
        parameter.requires_grad_(True)


def is_within(name: str, module: str) -> bool:
    """Returns whether `name` is the module or parameter `module`, or below it."""
    return name == module or name.startswith(f"{module}.")


def keeps_weight(kept: str, site: str) -> bool:
    """Returns whether the weight of `site` is the parameter `kept`, or in the module `kept`."""
    return is_within(site, kept) or site == site_of(kept)


def trained_bases(model: nn.Module, kept: Collection[str], weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns a line for each kept parameter that shares memory with the base weight of a site.

    Args:
        model: the model.
        kept: names of the modules and parameters that are kept trainable.
        weights: site → its base weight.
    """
    if not kept:
        return []
    spans = {name: span_of(weight) for name, weight in weights.items()}
    return [
        f"`{name}` is kept trainable and shares its weight with `{site}`, which has an adapter: its base would change"
        for name, parameter in _kept_parameters(model, kept)
        for site, span in spans.items()
        if overlap(span_of(parameter), span)
    ]


def _kept_parameters(model: nn.Module, kept: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the kept parameters, with their names."""
    modules = dict(_modules(model))
    parameters = dict(_parameters(model))
    for name in kept:
        if name in parameters:
            yield name, parameters[name]
        elif name in modules:
            yield from modules[name].named_parameters(name, remove_duplicate=False)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        yield without_wrappers(path), module


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields each parameter under every name that its modules have for it."""
    for path, module in _modules(model):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield join_path(path, name), parameter


def _has_tensors(module: nn.Module) -> bool:
    """Returns whether the module has anything to save: a norm without weights still has statistics."""
    return any(True for _ in module.parameters()) or bool(module.state_dict(keep_vars=True))


def _can_be_trained(parameter: nn.Parameter) -> bool:
    """Returns whether `parameter` is a plain floating-point tensor; a quantised one is a subclass or of integers."""
    return type(own_part(parameter)) is torch.Tensor and parameter.is_floating_point()
