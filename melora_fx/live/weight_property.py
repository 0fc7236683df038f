"""What stands on a module's class in the place of an adapted weight, which stays a plain parameter of the module.

module.weight           a stand-in for a forward that computes with it; the parameter for everyone else
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
    """The attribute that gives the parameter to everyone."""
    return f"{parameter}{_OF_BASE}"


def add_weight_properties(cls: type, parameter: str) -> None:
    """Puts both properties on `cls`, a class of modules that run a graph."""
    setattr(cls, parameter, weight_property(parameter))
    setattr(cls, name_of_base(parameter), _base_property(parameter))


@functools.cache
def weight_property(parameter: str, name: str = "") -> Any:
    """The property that stands in the place of the weight of that name; or of another name of it, `name`."""
    name = name or parameter

    def read(self: Any) -> Any:
        weight = registered(self)[0].get(name)
        if weight is None:
            weight = _held(self, name)
        if weight is None or self.melora_mark.runs_base or not is_read_in_forward():
            return weight
        if name != parameter and weight is not _held(self, parameter):  # they have been parted since
            return weight
        return stand_in(self, parameter, weight)

    def write(self: nn.Module, value: Any) -> None:
        vars(self)[name] = value  # a tensor that is no parameter: pruned, or of FSDP

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
        return getattr(self, parameter)  # parametrized since

    return property(read)


def _held(module: nn.Module, parameter: str) -> Any:
    """The weight: a parameter, or a tensor that has been put in its place."""
    own = registered(module)[0]
    if parameter in own:
        return own[parameter]
    if parameter in vars(module):
        return vars(module)[parameter]
    raise AttributeError(f"'{type(module).__name__}' object has no attribute '{parameter}'")
