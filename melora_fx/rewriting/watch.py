"""Watches the first forwards of a rewritten model for reads of an adapted weight past its module's attribute.

`module.weight` returns what a forward must compute with (`live/weight_property.py`). A parameter taken from
`named_parameters()` or kept in a list is the base's, and a product with it has no adapter. A `TorchFunctionMode` sees
the product and raises. The mode slows a forward down, so it is active only in the first forward in training and the
first one in evaluation. If Dynamo compiles a forward, the compiled graph is checked instead.

The root's class is exchanged for a subclass whose forward wraps the model's own.
"""

import bisect
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from melora_fx import live
from melora_fx.adapter.site import MODULE_MARK
from melora_fx.capture.packed import is_packed_linear
from melora_fx.distributed.wrappers import class_inside, put_class
from melora_fx.distributed.zero import is_partitioned
from melora_fx.errors import MELoRAError
from melora_fx.live.arguments import name_of
from melora_fx.live.reader import frames_from, is_adapted, is_managing, is_of, know_methods
from melora_fx.live.refusals import REMEDY, hidden_refusals, reader
from melora_fx.live.shown import Standing
from melora_fx.lowering.lowerings import needs_plain_nodes
from melora_fx.names import join_path
from melora_fx.patterns.node import operator_name
from melora_fx.patterns.views import HARMLESS_PROPERTIES, is_harmless, is_harmless_use, is_view
from melora_fx.shared_memory import sharing_parameters, span_of
from melora_fx.torch_private import (
    compiled_so_far,
    compiles_around,
    inputs_of_compiled,
    is_compiled,
    registered,
    tree_leaves,
    while_compiling,
)

from .adapted_module import ExchangedModule, rewritten_modules, subclass_of, with_blank
from .marks import ROOT_MARK, RootMark

_MADE_OF_GRAPH = "<eval_with_key>"
"""The prefix of the file names that FX gives to generated functions."""

_HARMLESS = {*HARMLESS_PROPERTIES, "alias", "requires_grad_"}
"""Operations that reveal nothing of a parameter's values, in addition to those of `is_harmless`."""


class WatchedRoot(ExchangedModule):
    """The part of a root's class that melora_fx adds."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        know_methods(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return with_blank(super().__reduce_ex__(protocol), self, _blank, self.melora_replaced)


def _blank(cls: type) -> Any:
    """Returns an object without attributes, of the class for watched roots of the class `cls`."""
    return object.__new__(_watched_class(cls))


def watch(model: nn.Module) -> None:
    """Starts watching the forwards of the rewritten `model`."""
    know_methods(model)
    put_class(model, _watched_class(type(model)))


def stop_watching_reads(model: nn.Module) -> None:
    """Undoes `watch`."""
    if isinstance(model, WatchedRoot) and "melora_replaced" in vars(
        class_inside(model)
    ):  # absent if a user derived the class
        put_class(model, model.melora_replaced)


_classes: WeakValueDictionary[type, type] = WeakValueDictionary()


def _watched_class(cls: type) -> type:
    watched = _classes.get(cls)
    if watched is None:
        watched = _classes[cls] = subclass_of(WatchedRoot, cls, {"forward": _watching_forward(cls)})
    return watched


def _watching_forward(cls: Any) -> Callable[..., Any]:
    """Returns a forward around that of `cls`, with its own code object, by which Dynamo counts compilations.

    Its `__wrapped__` is the forward of `cls`: FX reads the arguments of a trace there, and code that calls
    `__wrapped__` instead of this forward, as accelerate does, bypasses only the watch.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            output = cls.forward(self, *args, **kwargs)
            while_compiling()(_check_graph)
            return output
        training = self.training
        mark: RootMark | None = vars(self).get(ROOT_MARK)  # None if a user derived the root's class
        if mark is None or training in mark.watched or compiles_around() or not _can_watch(self):
            return cls.forward(self, *args, **kwargs)
        with _Watch(self), _refusals_shown():
            output = cls.forward(self, *args, **kwargs)
        mark.watched.add(training)
        return output

    forward.__code__ = forward.__code__.replace()
    return functools.update_wrapper(forward, cls.forward)


@contextmanager
def _refusals_shown() -> Iterator[None]:
    """Raises a refusal itself if TorchScript has hidden its text in another error."""
    with hidden_refusals() as texts:
        try:
            yield
        except RuntimeError as error:
            if texts and "TorchScript" in str(error):
                raise MELoRAError(texts[-1]) from error
            raise


def _can_watch(model: nn.Module) -> bool:
    """Returns whether the adapters run, and a mode would not disturb a tracer or what Dynamo compiles and guards.

    Every forward of a model that cannot be watched asks this, so the first module that forbids it ends the search.
    """
    if needs_plain_nodes():
        return False
    has_fast_path = not torch.is_grad_enabled()
    for module in model.modules():
        if is_compiled(module) or (MODULE_MARK in vars(module) and not is_adapted(module)):
            return False
        if has_fast_path and isinstance(module, nn.MultiheadAttention):
            return False  # the mode would turn the fast path off, and the slow path rounds differently
    return not is_partitioned(model)  # ZeRO-3's weights cannot be recognised by their memory


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yields (module, parameter, site) of the sites whose weight is a plain parameter with a single name.

    A weight with several names may be read elsewhere legitimately.
    """
    shared = sharing_parameters(model)
    for path, module in rewritten_modules(model):
        for record in () if is_packed_linear(module) else module.melora_mark.records:
            if record.parameter in registered(module)[0] and join_path(path, record.parameter) not in shared:
                yield module, record.parameter, record.site_name(path)


class _Weights:
    """The watched weights, found by the memory of a tensor, so that a view counts as its weight."""

    def __init__(self, model: nn.Module) -> None:
        try:
            places = [place for place in _places(model) if is_adapted(place[0])]
        except RuntimeError:  # `functional_call` has replaced parameters with tensors that have no memory of their own
            places = []
        held = [(registered(module)[0][parameter], name) for module, parameter, name in places]
        self.spans = sorted((*span, name) for weight, name in held if (span := _span(weight)))

    def name_of(self, value: Any) -> str | None:
        """Returns the site whose weight contains the memory of `value`, or None."""
        span = _span(value)
        index = bisect.bisect_right(self.spans, (*span[:2], math.inf, "")) if span else 0
        if not span or not index:
            return None
        device, _, end, name = self.spans[index - 1]
        return name if device == span[0] and span[1] < end else None


def _span(value: Any) -> tuple[int, int, int] | None:
    """Returns the memory of a tensor. None for anything else, for a stand-in, and for a tensor of `torch.func` or of
    forward-mode derivatives, which has no memory.
    """
    if not issubclass(type(value), torch.Tensor) or issubclass(type(value), Standing):
        return None
    try:
        return span_of(value)
    except RuntimeError:
        return None


class _Watch(TorchFunctionMode):
    """Raises MELoRAError if code that is not ours passes a watched parameter, or a view of it, to a torch function."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = _Weights(model)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = name_of(func)
        for value in tree_leaves((args, kwargs)) if operation not in _HARMLESS else ():
            if is_harmless(operation, is_first=bool(args) and value is args[0]):
                continue
            site = self.weights.name_of(value)
            if site and not _is_ours(sys._getframe(1)):
                raise MELoRAError(_refusal(site, reader(), operation))
        return func(*args, **(kwargs or {}))


def _is_ours(caller: FrameType) -> bool:
    """Returns whether the call in the frame `caller` is legitimate.

    It is if `caller` manages weights for others, or if a function of ours, or one generated from a graph, is among its
    callers up to the user's innermost forward. Torch may be in between, such as in an autograd hook that packs saved
    tensors.
    """
    if is_managing(caller):
        return True
    for frame in frames_from(caller):
        if is_of(frame, "melora_fx") or frame.f_code.co_filename.startswith(_MADE_OF_GRAPH):
            return True
        if frame.f_code.co_name == "forward" and not is_of(frame, "torch", "deepspeed"):
            return False
    return False


def _check_graph(compilation: Any) -> None:
    """Raises MELoRAError if a node that Dynamo has compiled, outside our own graphs, uses an adapted weight."""
    model, graph = compiled_so_far(compilation)
    if model is None:  # after a graph break this is not the graph of the forward
        return
    weights = _Weights(model)
    for value, node, users in inputs_of_compiled(graph):
        site = weights.name_of(value)
        for read, user in _uses(node, users) if site else ():
            operation = operator_name(user)
            stack = user.stack_trace or ""
            is_by_right = operation in _HARMLESS or is_harmless_use(user, read)
            if not is_by_right and not any(file in stack for file in _OUR_FILES):
                raise _CompiledReadError(_refusal(str(site), "compiled code", operation))


def _uses(node: fx.Node, users: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yields (value, user) pairs: the value is `node`, or a view, a copy or a cast of it, and the user a node."""
    for user in users:
        is_of_it = user.args[:1] == (node,)
        if is_of_it and (is_view(user) or operator_name(user) == "detach"):
            yield from _uses(user, user.users)
        else:
            yield node, user


_OUR_FILES = (_MADE_OF_GRAPH, str(Path(live.__file__).parent))
"""Files of the functions that may use adapted weights."""


class _CompiledReadError(MELoRAError, AssertionError):
    """An AssertionError too, because Dynamo passes AssertionErrors on unchanged."""


def _refusal(name: str, who: str, operation: str) -> str:
    return (
        f"`{name}`: {who} uses its weight in `{operation}`, but did not read it from the module's attribute "
        f"(rather from `named_parameters()`, a list, a default argument), so its adapter does not run: {REMEDY}"
    )
