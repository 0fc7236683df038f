"""The class of modules that run their own forward, in which the products with adapted weights have their adapters.

The class is exchanged for a subclass with the properties of `live/weight_property.py` in place of the adapted weights.
Everything else, the forward included, is the user's. Modules that compute alike share a class, as those with graphs do.
"""

from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import nn

from melora_fx.adapter.site import MODULE_MARK, SiteRecord
from melora_fx.capture.trace import UntraceableError, trace_module
from melora_fx.distributed.wrappers import put_class
from melora_fx.errors import MELoRAError
from melora_fx.live.foreseen import foresee_linears
from melora_fx.live.weight_property import weight_property
from melora_fx.patterns.node import weight_of
from melora_fx.patterns.patterns import find_linear_nodes
from melora_fx.torch_private import registered

from .adapted_module import (
    AdaptedModule,
    attributes_of_class,
    refuse_copy_inside_folded,
    subclass_of,
    with_blank,
)
from .marks import ROOT_MARK, ModuleMark
from .watch import watch


class OwnForwardModule(AdaptedModule):
    """The part of the module's class that melora_fx adds."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_copy_inside_folded(self)
        return with_blank(super().__reduce_ex__(protocol), self, _blank, self.melora_class)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        mark = self.melora_mark
        vars(self)[MODULE_MARK] = ModuleMark(mark.records, mark.path)
        if _enter_class(self, self.melora_class):
            _foresee(self)
        if ROOT_MARK in vars(self):
            watch(self)

    def __delattr__(self, name: str) -> None:
        if any(record.parameter == name for record in self.melora_mark.records):
            raise MELoRAError(
                f"`{name}` of this {self.melora_class.__name__} is adapted, and cannot be parametrized or removed: "
                "call `fold` first"
            )
        super().__delattr__(name)


class _ClassKey(NamedTuple):
    """Everything that the products of a module depend on: the record and the weight's shape and dtype of each site."""

    melora_class: type
    sites: tuple[Any, ...]


_classes: WeakValueDictionary[_ClassKey, type] = WeakValueDictionary()


def install_own_forward(module: nn.Module, records: list[SiteRecord], path: str) -> OwnForwardModule:
    """Gives `module`, at `path` of its model, the properties for the sites of `records`; returns the same object."""
    vars(module)[MODULE_MARK] = ModuleMark(records, path)
    _enter_class(module, type(module))
    assert isinstance(module, OwnForwardModule)
    return module


def _enter_class(module: nn.Module, original: type) -> bool:
    """Puts `module` into the class for its sites; returns whether the class is new: its products are unknown then."""
    records = vars(module)[MODULE_MARK].records
    key = _ClassKey(original, tuple(_of_site(module, record) for record in records))
    cls = _classes.get(key)
    is_new = cls is None
    if cls is None:
        cls = _classes[key] = _new_class(original)
        for record in records:
            for name in _names_of_weight(module, record):
                setattr(cls, name, weight_property(record.parameter, name))
    put_class(module, cls)
    return is_new


def _foresee(module: OwnForwardModule) -> None:
    """Builds the products that `rewrite` has built in another process, by tracing the module in its original class."""
    cls = type(module)
    put_class(module, module.melora_class)
    try:
        graphs = trace_module(module).graphs
    except UntraceableError:
        graphs = []
    finally:
        put_class(module, cls)
    for record in module.melora_mark.records:
        linears = [each for graph in graphs for each in find_linear_nodes(graph, module)]
        own = [linear for linear in linears if linear.parameter == record.parameter]
        foresee_linears(module, own, weight_of(module, record.parameter))


def _names_of_weight(module: nn.Module, record: SiteRecord) -> tuple[str, ...]:
    """Returns the names under which `module` itself holds the weight of a site."""
    own, _, _ = registered(module)
    return tuple(name for name, parameter in own.items() if parameter is own[record.parameter])


def _of_site(module: nn.Module, record: SiteRecord) -> tuple[Any, ...]:
    weight: torch.Tensor = weight_of(module, record.parameter)
    return (
        _names_of_weight(module, record),
        record.parameter,
        record.config,
        record.lowering,
        record.weight_is_transposed,
        record.row_dims,
        weight.shape,
        weight.dtype,
    )


def _new_class(original: type) -> type:
    return subclass_of(OwnForwardModule, original, attributes_of_class(original))


def _blank(original: type) -> Any:
    """Returns an object without attributes, which `__setstate__` turns into a module."""
    return object.__new__(_new_class(original))
