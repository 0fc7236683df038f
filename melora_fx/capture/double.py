"""Makes a double of a module, so that a trace changes the double and not the module."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from melora_fx.torch_private import registered


def double_of(module: nn.Module, training: bool) -> nn.Module:
    """Returns a module of the same class in the mode `training`. It shares the parameters of `module`, and has copies
    of all other attributes and of the modules below.

    Values that cannot be copied are shared, too.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    children = list(_of_python(module))
    doubles = {id(child): object.__new__(type(child)) for child in children}
    memo |= {id(child): child for child in module.modules()} | doubles
    for child in children:
        vars(doubles[id(child)]).update({name: copied(value, memo) for name, value in vars(child).items()})
        vars(doubles[id(child)])["training"] = training
    double: nn.Module = doubles[id(module)]
    return double


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """Returns a deep copy. If that fails, copies dicts and lists item by item, and returns other values themselves.

    `memo` is as in `copy.deepcopy`.
    """
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # anything that refuses to be copied, such as a lock, a file, a computed tensor
        if type(value) is dict:
            return {key: copied(item, memo) for key, item in value.items()}
        return [copied(item, memo) for item in value] if type(value) is list else value


def holders(module: nn.Module) -> list[dict[str, Any]]:
    """Returns the dicts with all attributes of `module` and of the modules below it."""
    return [holder for child in _of_python(module) for holder in (vars(child), *registered(child))]


def _of_python(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the module and those below it, except TorchScript modules, which store nothing in Python."""
    return (child for child in module.modules() if not isinstance(child, torch.jit.ScriptModule))
