"""Which modules `keep_trainable` names, and why one cannot be trained."""

from collections.abc import Sequence

import torch
from torch import nn

from melora_fx.names import without_wrappers

from .targets import name_matches, nearest


def resolve_kept(model: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the modules that `patterns` name, without those below another of them.

    Raises:
        TypeError: where `patterns` is neither a name nor a list of names.
        ValueError: for a name that matches no module with parameters, and for a quantised module.
    """
    if not isinstance(patterns, str | Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"`keep_trainable` must be a name or a list of names, got {patterns!r}")
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    modules = {without_wrappers(name): module for name, module in model.named_modules()}
    names = [name for name, module in modules.items() if name and any(True for _ in module.parameters())]
    kept: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in names if name_matches(pattern, name)]
        if not hits:
            raise ValueError(f"`keep_trainable`: {pattern!r} matches no module; nearest: {nearest(pattern, names)}")
        kept.update(dict.fromkeys(hits))
    for name in kept:
        if not all(_can_be_trained(parameter) for parameter in modules[name].parameters()):
            raise ValueError(
                f"`keep_trainable`: {name!r} is quantised and cannot be trained: leave it out of the quantisation "
                "(`modules_to_not_convert`, `llm_int8_skip_modules`), or adapt it"
            )
    return tuple(name for name in kept if not any(name != other and is_within(name, other) for other in kept))


def is_within(name: str, module: str) -> bool:
    """Whether `name` is the module's or below it."""
    return name == module or name.startswith(f"{module}.")


def _can_be_trained(parameter: nn.Parameter) -> bool:
    """Whether it is a plain tensor of floats: a quantised one is a subclass, or of integers."""
    return type(parameter.detach()) is torch.Tensor and parameter.is_floating_point()
