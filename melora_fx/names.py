"""Dotted names: of modules, parameters and sites, and what stands at them."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .torch_private import WRAPPED


def join_path(*parts: str) -> str:
    """Dotted name of the parts that are not empty."""
    return ".".join(part for part in parts if part)


def without_wrappers(name: str) -> str:
    """`name` as it is without the wrappers of single layers, `torch.compile`'s and `checkpoint_wrapper`'s.

    Both give their layer's attributes as their own, so that the shorter name leads to the same module.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def site_name(owner: str, parameter: str) -> str:
    """Name of the site whose weight is `parameter` of the module at `owner`."""
    return owner if owner and parameter == "weight" else join_path(owner, parameter)


def site_of(parameter: str) -> str:
    """The same, by the parameter's whole name."""
    owner, _, name = parameter.rpartition(".")
    return site_name(owner, name)


def get_attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path below `module` ("" is `module` itself), or None where there is none."""
    value: Any = module
    for name in path.split(".") if path else ():
        value = getattr(value, name, None)
    return value


def with_parents(name: str) -> list[str]:
    """`name` and those of the modules that it is below, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


_HOLDERS = (("torch.", "DistributedDataParallel"), ("deepspeed.", "DeepSpeedEngine"))
"""(package, class) of the wrappers whose `module` is the model as it was."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of `torch.compile`, DDP and DeepSpeed, or `model` itself."""
    kinds = type(model).__mro__
    is_held = any(cls.__name__ == name and cls.__module__.startswith(root) for cls in kinds for root, name in _HOLDERS)
    inner = model.module if is_held else getattr(model, WRAPPED[0], None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def first_of(names: Sequence[str], most: int = 5) -> str:
    """The first names, for a message, and how many more there are."""
    return ", ".join(names[:most]) + (f", … ({len(names) - most} more)" if len(names) > most else "")


def default_labels(count: int) -> list[str]:
    """What transformers calls labels that have no names."""
    return [f"LABEL_{index}" for index in range(count)]
