"""Defines the properties that replace an adapted weight on its module's class; the weight stays a plain parameter.

module.weight           a stand-in for a forward that computes with it; the parameter for all other code
module.weight_of_base   the parameter, for the graphs of `rewrite` itself
"""

import functools
from typing import Any

from torch import nn

from melora_fx.torch_private import registered

from .reader import is_read_in_forward
from .stand_in import stand_in

_OF_BASE = "_of_base"


def name_of_base(parameter: str) -> str:
    """Returns the name of the attribute that is the parameter for every reader."""
    return f"{parameter}{_OF_BASE}"


def add_weight_properties(cls: type, parameter: str) -> None:
    """Puts both properties on `cls`, a class of modules that run a graph."""
    setattr(cls, parameter, weight_property(parameter))
    setattr(cls, name_of_base(parameter), _base_property(parameter))


@functools.cache
def weight_property(parameter: str, name: str = "") -> Any:
    """Returns the property that replaces the weight `parameter`, or a further name of that weight, `name`."""
    name = name or parameter

    def read(self: Any) -> Any:
        weight = registered(self)[0].get(name)
        if weight is None:
            weight = _held(self, name)
        if weight is None or self.melora_mark.runs_base or not is_read_in_forward():
            return weight
        if name != parameter and weight is not _held(self, parameter):  # the names no longer share a weight
            return weight
        return stand_in(self, parameter, weight)

    def write(self: nn.Module, value: Any) -> None:
        vars(self)[name] = value  # a tensor that is not a parameter: of pruning or FSDP

    def delete(self: nn.Module) -> None:
        _held(self, name)
        del vars(self)[name]

    return property(read, write, delete)


@functools.cache
def _base_property(parameter: str) -> Any:
    def read(self: nn.Module) -> Any:
        own = registered(self)[0]
        if parameter in own:
            return own[parameter]
        return getattr(self, parameter)  # it was parametrized after the rewrite

    return property(read)


def _held(module: nn.Module, parameter: str) -> Any:
    """Returns the weight: the parameter, or a tensor that has replaced it."""
    own = registered(module)[0]
    if parameter in own:
        return own[parameter]
    if parameter in vars(module):
        return vars(module)[parameter]
    raise AttributeError(f"'{type(module).__name__}' object has no attribute '{parameter}'")
