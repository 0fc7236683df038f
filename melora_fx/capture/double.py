"""A double of a module: what a trace may do to it, it does not do to the module."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from melora_fx.torch_private import registered


def double_of(module: nn.Module, training: bool) -> nn.Module:
    """A module of the same class with the same parameters and copies of all else, below it too, in the mode `training`.

    What cannot be copied is shared.
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
    """A deep copy as far as there is one; `memo` as in `copy.deepcopy`."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a lock, a file, a tensor that someone computed: whatever refuses to be copied
        if type(value) is dict:
            return {key: copied(item, memo) for key, item in value.items()}
        return [copied(item, memo) for item in value] if type(value) is list else value


def holders(module: nn.Module) -> list[dict[str, Any]]:
    """The dicts that hold all that stands on `module` and below it."""
    return [holder for child in _of_python(module) for holder in (vars(child), *registered(child))]


def _of_python(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those below it, but for those of TorchScript, which hold nothing in Python."""
    return (child for child in module.modules() if not isinstance(child, torch.jit.ScriptModule))
