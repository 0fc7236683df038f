"""The first forwards of a rewritten model are watched for whoever reads an adapted weight past its module's attribute.

`module.weight` gives forwards what they must have (`live/weight_property.py`). A parameter that is taken from
`named_parameters()`, or that someone has kept in a list, is the base's, and a product with it has no adapter. Under a
`TorchFunctionMode` such a product is seen and raises. The mode slows a forward down, so it is on in the first one in
training and the first one in evaluation. Where Dynamo compiles a forward, the graph that it has made is looked at.

The root's class is exchanged for a subclass with another forward, around the model's own.
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
"""How the file names begin that FX gives to functions."""

_HARMLESS = {*HARMLESS_PROPERTIES, "alias", "requires_grad_"}
"""What tells nothing of a parameter's values, beside what `is_harmless` says."""


class WatchedRoot(ExchangedModule):
    """The half of a root's class that is ours."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        know_methods(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return with_blank(super().__reduce_ex__(protocol), self, _blank, self.melora_replaced)


def _blank(cls: type) -> Any:
    """An object without attributes, of the class for watched roots of the class `cls`."""
    return object.__new__(_watched_class(cls))


def watch(model: nn.Module) -> None:
    """From here on the forwards of the rewritten `model` are watched."""
    know_methods(model)
    put_class(model, _watched_class(type(model)))


def stop_watching_reads(model: nn.Module) -> None:
    """Undoes `watch`."""
    if isinstance(model, WatchedRoot) and "melora_replaced" in vars(
        class_inside(model)
    ):  # not of a user's class below it
        put_class(model, model.melora_replaced)


_classes: WeakValueDictionary[type, type] = WeakValueDictionary()


def _watched_class(cls: type) -> type:
    watched = _classes.get(cls)
    if watched is None:
        watched = _classes[cls] = subclass_of(WatchedRoot, cls, {"forward": _watching_forward(cls)})
    return watched


def _watching_forward(cls: Any) -> Callable[..., Any]:
    """A forward around that of `cls`, with a code object of its own, since Dynamo counts compilations by these.

    It names the other as its `__wrapped__`: FX takes the arguments of a trace from there, and whoever leads around this
    forward, as accelerate does, leaves out the watch alone.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            output = cls.forward(self, *args, **kwargs)
            while_compiling()(_check_graph)
            return output
        training = self.training
        mark: RootMark | None = vars(self).get(ROOT_MARK)  # none on a module of a class below this one
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
    """A refusal whose text TorchScript has hidden is raised itself."""
    with hidden_refusals() as texts:
        try:
            yield
        except RuntimeError as error:
            if texts and "TorchScript" in str(error):
                raise MELoRAError(texts[-1]) from error
            raise


def _can_watch(model: nn.Module) -> bool:
    """Whether the adapters run, and a mode would be in nobody's way: a tracer's, or what Dynamo compiles and guards.

    A model that cannot be watched is asked in each forward: the first module that forbids it ends the search.
    """
    if needs_plain_nodes():
        return False
    has_fast_path = not torch.is_grad_enabled()
    for module in model.modules():
        if is_compiled(module) or (MODULE_MARK in vars(module) and not is_adapted(module)):
            return False
        if has_fast_path and isinstance(module, nn.MultiheadAttention):
            return False  # the mode would turn it off, and the outputs of others are rounded otherwise
    return not is_partitioned(model)  # whose weights are not told by their memory


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, parameter, site) of the sites in place; a weight with several names has other readers by right."""
    shared = sharing_parameters(model)
    for path, module in rewritten_modules(model):
        for record in () if is_packed_linear(module) else module.melora_mark.records:
            if record.parameter in registered(module)[0] and join_path(path, record.parameter) not in shared:
                yield module, record.parameter, record.site_name(path)


class _Weights:
    """The weights that are watched, to be found by the memory of a tensor: a view of one is one too."""

    def __init__(self, model: nn.Module) -> None:
        try:
            places = [place for place in _places(model) if is_adapted(place[0])]
        except RuntimeError:  # tensors without memory of their own are in the place of parameters, by `functional_call`
            places = []
        held = [(registered(module)[0][parameter], name) for module, parameter, name in places]
        self.spans = sorted((*span, name) for weight, name in held if (span := _span(weight)))

    def name_of(self, value: Any) -> str | None:
        """The site whose weight `value` lies in, or None."""
        span = _span(value)
        index = bisect.bisect_right(self.spans, (*span[:2], math.inf, "")) if span else 0
        if not span or not index:
            return None
        device, _, end, name = self.spans[index - 1]
        return name if device == span[0] and span[1] < end else None


def _span(value: Any) -> tuple[int, int, int] | None:
    """The memory of a tensor, None for all else: also for a stand-in, and for a tensor of `torch.func` or of
    forward-mode derivatives, which has none.
    """
    if not issubclass(type(value), torch.Tensor) or issubclass(type(value), Standing):
        return None
    try:
        return span_of(value)
    except RuntimeError:
        return None


class _Watch(TorchFunctionMode):
    """Raises where a function of torch is given the parameter itself, or a view of it, and not by us."""

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
    """Whether it is a function of ours that calls torch in the frame `caller`, those made of graphs included, or that
    has made torch call what does: a hook of autograd's that packs what is saved; or what manages weights for others.
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
    """Raises where a node of what Dynamo has compiled, and of none of our graphs, is given an adapted weight."""
    model, graph = compiled_so_far(compilation)
    if model is None:  # behind a graph break, where this is not what the forward was compiled to
        return
    weights = _Weights(model)
    for value, node, users in inputs_of_compiled(graph):
        site = weights.name_of(value)
        for read, user in _uses(node, users) if site else ():
            operation = operator_name(user)
            stack = user.stack_trace or ""
            is_by_right = operation in _HARMLESS or is_harmless_use(user, read)
            if not is_by_right and not any(file in stack for file in _OUR_FILES):
                raise _CompiledReadError(_refusal(str(site), "what is compiled", operation))


def _uses(node: fx.Node, users: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(what is used, the node that uses it): `node`, or a view, a copy or a cast of it."""
    for user in users:
        is_of_it = user.args[:1] == (node,)
        if is_of_it and (is_view(user) or operator_name(user) == "detach"):
            yield from _uses(user, user.users)
        else:
            yield node, user


_OUR_FILES = (_MADE_OF_GRAPH, str(Path(live.__file__).parent))
"""Of the functions that use adapted weights by right."""


class _CompiledReadError(MELoRAError, AssertionError):
    """Dynamo passes an AssertionError on as it is."""


def _refusal(name: str, who: str, operation: str) -> str:
    return (
        f"`{name}`: {who} uses its weight by `{operation}`, and has it from elsewhere than the module's attribute "
        f"(`named_parameters()`, a list, a default argument), so that its adapter does not run: {REMEDY}"
    )
