"""The class of a rewritten module: all modules that run the same code share one.

What Dynamo does decides this:

* It keeps compiled code by the forward's code object and guards on the class of the module. Layers of equal code are
  of one class, so that regional compilation, which compiles layer by layer, compiles once for all of them.
* It compiles one code object at most 8 times (`torch._dynamo.config.recompile_limit`) and then runs it uncompiled. The
  forwards of all classes are made by one function and would count together: each class has a code object of its own.

accelerate and others look for the function below a wrapper in `__wrapped__` and put it in the wrapper's place. A
class's forward has none: what it would lead to is the plain graph's function, which knows no base and no lowering.
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
    """All that the forward of a rewritten module depends on beside the module's tensors.

    `operators`: the names that the code uses and the `id` of what each stands for. `sites`: the lowering and the
    weight's shape of each.
    """

    melora_class: type
    code: str
    operators: tuple[tuple[str, int], ...]
    sites: tuple[tuple[str, torch.Size], ...]


_classes: WeakValueDictionary[ClassKey, type] = WeakValueDictionary()
"""The classes in use. A class keeps its operators alive, so no `id` in a key is another object's meanwhile."""


def class_key(
    module: fx.GraphModule, melora_class: type, records: list[SiteRecord], code: fx.graph.PythonCode
) -> ClassKey:
    """The key of `module`, whose graph is `code`."""
    return ClassKey(
        melora_class,
        code.src,
        operators=tuple((name, id(value)) for name, value in code.globals.items()),
        sites=tuple((record.lowering, weight_of(module, record.parameter).shape) for record in records),
    )


def class_of(key: ClassKey, module: fx.GraphModule, records: list[SiteRecord]) -> type:
    """The one class of all modules with this key.

    Where there is none yet, it is the class that `module` has, its own, to which `fx.GraphModule.recompile` has given
    the forward of the plain graph.
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
    """`forward` with the name and the signature of `plain` and a code object of its own."""
    presented: Any = functools.update_wrapper(forward, plain)
    presented.__code__ = presented.__code__.replace()
    presented.__signature__ = inspect.signature(plain)
    del presented.__wrapped__
    return presented
