"""The class of a rewritten module, which all modules that run the same code share.

Two properties of Dynamo require this:

* It caches compiled code by the forward's code object, and guards on the class of the module. Layers with equal code
  share a class, so that regional compilation, which compiles layer by layer, compiles once for all of them.
* It compiles a code object at most 8 times (`torch._dynamo.config.recompile_limit`) and then runs it uncompiled. One
  function creates the forwards of all classes, so they would count together: each class gets its own code object.

accelerate and others take the function in a wrapper's `__wrapped__` and put it in the wrapper's place. The forward of a
class has no `__wrapped__`: it would be the plain graph's function, which knows neither the base nor a lowering.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import fx

from melora_fx.adapter.site import SiteRecord
from melora_fx.live.foreseen import foresee_calls
from melora_fx.patterns.node import weight_of

from .running import choosing_forward, weights_behind_properties


class ClassKey(NamedTuple):
    """Everything except the module's tensors that the forward of a rewritten module depends on.

    `operators`: the names that the code uses, each with the `id` of the object that it names. `sites`: the lowering and
    the shape of the weight of each site.
    """

    melora_class: type
    code: str
    operators: tuple[tuple[str, int], ...]
    sites: tuple[tuple[str, torch.Size], ...]


_classes: WeakValueDictionary[ClassKey, type] = WeakValueDictionary()
"""The classes in use. A class keeps its operators alive, so no other object can get an `id` that is in its key."""


def class_key(
    module: fx.GraphModule, melora_class: type, records: list[SiteRecord], code: fx.graph.PythonCode
) -> ClassKey:
    """Returns the key of `module`, whose graph has generated `code`."""
    return ClassKey(
        melora_class,
        code.src,
        operators=tuple((name, id(value)) for name, value in code.globals.items()),
        sites=tuple((record.lowering, weight_of(module, record.parameter).shape) for record in records),
    )


def class_of(key: ClassKey, module: fx.GraphModule, records: list[SiteRecord]) -> type:
    """Returns the class that all modules with this key share.

    If none exists yet, the present class of `module`, which no other module has, becomes that class.
    `fx.GraphModule.recompile` has given it the forward of the plain graph.
    """
    cls: Any = _classes.get(key)
    if cls is None:
        cls = type(module)
        cls.forward = _presented_as(cls.forward, choosing_forward(module, records))
        _classes[key] = cls
        for record in records:
            if record.parameter in weights_behind_properties(module):
                foresee_calls(module, record, weight_of(module, record.parameter))
    return cls


def _presented_as(plain: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `forward` with the name and the signature of `plain` and its own code object."""
    presented: Any = functools.update_wrapper(forward, plain)
    presented.__code__ = presented.__code__.replace()
    presented.__signature__ = inspect.signature(plain)
    del presented.__wrapped__
    return presented
