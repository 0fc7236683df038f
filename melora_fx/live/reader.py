"""Decides who reads an adapted weight: a forward, which gets a stand-in, or code that only looks at the base."""

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
"""Part of the name of a function that is defined in a forward. Another thread or autograd may call it later."""

_MANAGING = ("torch.distributed", "torch.fx", "accelerate")
"""Packages that manage weights for others, even in the middle of a forward."""

_RECOMPUTING = ("torch.utils.checkpoint", ".checkpointing")
"""Endings of the names of Python modules that recompute a part of a forward during the backward pass."""


def is_read_in_forward() -> bool:
    """Returns whether the code that reads an attribute, two frames up from here, computes with it.

    It does inside the forward of a module, and in a method of a rewritten model that takes arguments, such as
    `get_text_features(self, ids)`. Code that Dynamo compiles always does.
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
    """The role of a Python module in handling weights."""

    OURS = auto()
    MANAGING = auto()
    RECOMPUTING = auto()
    OTHER = auto()


@functools.cache
def _kind_of(module: Any) -> _Kind:
    """Returns the kind of the Python module of that name."""
    name = str(module)
    if name.partition(".")[0] in OURS:
        return _Kind.OURS
    if _is_within(name, _MANAGING):
        return _Kind.MANAGING
    return _Kind.RECOMPUTING if name.endswith(_RECOMPUTING) else _Kind.OTHER


_methods: WeakValueDictionary[int, CodeType] = WeakValueDictionary()
"""The code of the methods of rewritten models that compute, by `id`, since code objects compare by value. The code
shows which method a frame runs: reading the frame's local variables would keep their values alive.
"""

_NOT_COMPUTING = ("torch", "melora_fx", "transformers.modeling_utils", "transformers.generation")
"""Packages whose methods store, load and save weights, but do not compute with them."""


_OF_ANY_MODULE = {*dir(nn.Module), "_init_weights"} - {"forward", "__call__"}
"""Names of methods that manage a module, such as `train` and `to`, even if a class overrides them."""


def is_recomputed() -> bool:
    """Returns whether the checkpointing of torch or accelerate runs the function that is two frames up from here."""
    callers = frames_from(sys._getframe(2))
    return any(_kind_of(frame.f_globals.get("__name__")) is _Kind.RECOMPUTING for frame in callers)


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    """Yields a frame and all its callers, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def know_methods(model: nn.Module) -> None:
    """Registers the methods of the modules of `model` that take arguments, as methods that compute with weights."""
    classes = {base for module in model.modules() for base in type(module).__mro__[:-1]}
    for cls in classes:
        if _is_within(str(cls.__module__), _NOT_COMPUTING):
            continue
        for name, method in vars(cls).items():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if code is not None and name not in _OF_ANY_MODULE and _takes_something(code):
                _methods[id(code)] = code


def _takes_something(code: CodeType) -> bool:
    """Returns whether a method has an argument in addition to `self`."""
    is_variadic = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return code.co_argcount > 1 or code.co_kwonlyargcount > 0 or is_variadic != 0


def _is_within(module: str, packages: tuple[str, ...]) -> bool:
    """Returns whether the module of that name is one of `packages`, or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def is_managing(frame: FrameType) -> bool:
    """Returns whether the code of `frame` manages weights for others, such as torch's code for several processes."""
    return _kind_of(frame.f_globals.get("__name__")) is _Kind.MANAGING


def is_of(frame: FrameType, *packages: str) -> bool:
    """Returns whether the code of `frame` belongs to one of `packages`."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in packages


def is_adapted(owner: nn.Module) -> bool:
    """Returns whether the module runs its adapters now: it is not folded, and does not temporarily run its base."""
    mark = vars(owner).get(MODULE_MARK)
    return mark is not None and not mark.runs_base
