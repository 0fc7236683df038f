"""Who reads an adapted weight: a forward, for which a stand-in is right, or someone who only looks at the base."""

import functools
import inspect
import sys
from collections.abc import Iterator
from enum import Enum, auto
from types import CodeType, FrameType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from melora_fx.adapter.site import MODULE_MARK

OURS = ("melora_fx", "exporters")

_OF_CALLS = ("forward", "_call_impl")
"""Names of the functions that run while a module is called, hooks included."""

_IN_A_FORWARD = ".forward.<locals>."
"""In the names of functions that a forward makes, which may be called from elsewhere: another thread, autograd."""

_MANAGING = ("torch.distributed", "torch.fx", "accelerate")
"""The packages that hold weights for others, in the middle of a forward too."""

_RECOMPUTING = ("torch.utils.checkpoint", ".checkpointing")
"""How the names of modules end that compute a part of a forward once more during the backward."""


def is_read_in_forward() -> bool:
    """Whether whoever reads an attribute, two frames up from here, does so to compute with it.

    That is, from within the forward of a module, or from a method of a rewritten model that takes arguments,
    as `get_text_features(self, ids)`. What Dynamo compiles is always computed with.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    frame: FrameType | None = sys._getframe(2)
    if frame is None or _kind_of(frame.f_globals.get("__name__")) in (_Kind.OURS, _Kind.MANAGING):
        return False
    while frame is not None:
        code = frame.f_code
        if (code.co_name in _OF_CALLS and code.co_argcount) or _IN_A_FORWARD in code.co_qualname:
            return True
        if _methods.get(id(code)) is code:
            return True
        if _kind_of(frame.f_globals.get("__name__")) is _Kind.RECOMPUTING:
            return True
        frame = frame.f_back
    return False


class _Kind(Enum):
    """What a module of Python has to do with weights."""

    OURS = auto()
    MANAGING = auto()
    RECOMPUTING = auto()
    OTHER = auto()


@functools.cache
def _kind_of(module: Any) -> _Kind:
    """The kind of the module of that name."""
    name = str(module)
    if name.partition(".")[0] in OURS:
        return _Kind.OURS
    if _is_within(name, _MANAGING):
        return _Kind.MANAGING
    return _Kind.RECOMPUTING if name.endswith(_RECOMPUTING) else _Kind.OTHER


_methods: WeakValueDictionary[int, CodeType] = WeakValueDictionary()
"""Of the methods of rewritten models' modules those that compute, by `id`, as codes compare by value. The code tells
who runs: to look at a frame's local names would keep alive what they hold.
"""

_NOT_COMPUTING = ("torch", "melora_fx", "transformers.modeling_utils", "transformers.generation")
"""The packages whose classes' methods hold, load and save weights."""


_OF_ANY_MODULE = {*dir(nn.Module), "_init_weights"} - {"forward", "__call__"}
"""Names of methods that manage a module, as `train` and `to`, whoever has overridden them."""


def is_recomputed() -> bool:
    """Whether torch's or accelerate's checkpointing runs the function that is two frames up from here."""
    callers = frames_from(sys._getframe(2))
    return any(_kind_of(frame.f_globals.get("__name__")) is _Kind.RECOMPUTING for frame in callers)


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame, the one that called it, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def know_methods(model: nn.Module) -> None:
    """From here on the methods of the modules of `model` that are given something compute with what they read."""
    classes = {base for module in model.modules() for base in type(module).__mro__[:-1]}
    for cls in classes:
        if _is_within(str(cls.__module__), _NOT_COMPUTING):
            continue
        for name, method in vars(cls).items():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if code is not None and name not in _OF_ANY_MODULE and _takes_something(code):
                _methods[id(code)] = code


def _takes_something(code: CodeType) -> bool:
    """Whether a method has an argument beside `self`."""
    is_variadic = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return code.co_argcount > 1 or code.co_kwonlyargcount > 0 or is_variadic != 0


def _is_within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether a module of that name is one of `packages`, or in one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def is_managing(frame: FrameType) -> bool:
    """Whether the code of `frame` holds weights for others: torch's for several processes, say."""
    return _kind_of(frame.f_globals.get("__name__")) is _Kind.MANAGING


def is_of(frame: FrameType, *packages: str) -> bool:
    """Whether the code of `frame` is a package's."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in packages


def is_adapted(owner: nn.Module) -> bool:
    """Whether the module runs its adapters now: not folded, and no base for a while."""
    mark = vars(owner).get(MODULE_MARK)
    return mark is not None and not mark.runs_base
