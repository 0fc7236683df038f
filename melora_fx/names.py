"""Builds and resolves the dotted names of modules, parameters and sites."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .torch_private import WRAPPED


def join_path(*parts: str) -> str:
    """Returns the dotted name of the parts that are not empty."""
    return ".".join(part for part in parts if part)


def without_wrappers(name: str) -> str:
    """Returns `name` without the wrappers of single layers, those of `torch.compile` and `checkpoint_wrapper`.

    Both wrappers expose the attributes of their layer, so the shorter name leads to the same module.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def site_name(owner: str, parameter: str) -> str:
    """Returns the name of the site whose weight is `parameter` of the module at `owner`."""
    return owner if owner and parameter == "weight" else join_path(owner, parameter)


def site_of(parameter: str) -> str:
    """Returns the name of the site whose weight has the dotted name `parameter`."""
    owner, _, name = parameter.rpartition(".")
    return site_name(owner, name)


def get_attribute(module: nn.Module, path: str) -> Any:
    """Returns the attribute at a dotted path below `module` ("" is `module` itself), or None if there is none."""
    value: Any = module
    for name in path.split(".") if path else ():
        value = getattr(value, name, None)
    return value


def with_parents(name: str) -> list[str]:
    """Returns the names of all parents of `name`, the outermost first, and `name` itself last."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


_HOLDERS = (("torch.", "DistributedDataParallel"), ("deepspeed.", "DeepSpeedEngine"))
"""(package, class) of the wrappers whose attribute `module` is the original model."""


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the module inside the wrappers of `torch.compile`, DDP and DeepSpeed, or `model` itself."""
    kinds = type(model).__mro__
    is_held = any(cls.__name__ == name and cls.__module__.startswith(root) for cls in kinds for root, name in _HOLDERS)
    inner = model.module if is_held else getattr(model, WRAPPED[0], None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def first_of(names: Sequence[str], most: int = 5) -> str:
    """Returns the first `most` names for a message, and how many more there are."""
    return ", ".join(names[:most]) + (f", … ({len(names) - most} more)" if len(names) > most else "")


def default_labels(count: int) -> list[str]:
    """Returns the names that transformers gives to `count` unnamed labels."""
    return [f"LABEL_{index}" for index in range(count)]
