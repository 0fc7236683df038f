"""Traces Python that depends on the values of its tensors: the tracer gives some answer and continues."""

import functools
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from .double import copied

_MOST_BRANCHES = 100
_LENGTH = 2
"""The number of items in every proxy that a forward counts or iterates over."""


class LenientTracer(fx.Tracer):
    """Traces one module's own forward and leaves every child as a call.

    Attributes:
        branch: the truth value of every tensor.
        num_branches: how often the forward has asked for a truth value.
        proxies: weak references to all proxies of the trace.
    """

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.branch = branch
        self.num_branches = 0
        self.proxies: list[weakref.ref[fx.Proxy]] = []
        self.graph = fx.Graph()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Passes a proxy for each argument that is not in `concrete_args`, and nothing to `**kwargs`. Uses FX's own
        method only for a forward with `*args`: that method calls a decorated forward incorrectly.
        """
        _, *parameters = inspect.signature(root_fn).parameters.values()
        if any(each.kind is each.VAR_POSITIONAL for each in parameters):
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        given = concrete_args or {}
        args: list[Any] = [self.root]
        kwargs: dict[str, Any] = {}
        for each in parameters:
            if each.kind is each.VAR_KEYWORD:
                continue
            value = (
                copied(given[each.name], {})
                if each.name in given
                else self.create_proxy("placeholder", each.name, (), {})
            )
            if each.kind is each.KEYWORD_ONLY:
                kwargs[each.name] = value
            else:
                args.append(value)
        return functools.partial(root_fn, *args, **kwargs), []

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:  # the module is not a child of the root
            return type(mod).__name__

    def to_bool(self, obj: Any) -> bool:
        self.num_branches += 1
        if self.num_branches > _MOST_BRANCHES:
            raise fx.proxy.TraceError("a loop whose end depends on tensors")
        return self.branch

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            return super().iter(obj)  # knows the number of items if they are unpacked
        except fx.proxy.TraceError:
            items: Any = obj
            return iter([items[index] for index in range(_LENGTH)])

    def keys(self, obj: fx.Proxy) -> Any:
        return []  # asked for `**kwargs`

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = LenientProxy(node, self)
        self.proxies.append(weakref.ref(made))
        return made


class LenientProxy(fx.Proxy):
    """Answers every question, but does not claim to be a tensor: C functions would treat it as one, and crash."""

    def __len__(self) -> int:
        return _LENGTH

    def __index__(self) -> int:
        return _LENGTH

    def __int__(self) -> int:
        return _LENGTH

    def __float__(self) -> float:
        return float(_LENGTH)

    def __contains__(self, item: object) -> bool:
        return bool(self.tracer.to_bool(self))

    def __setitem__(self, index: Any, value: Any) -> None:
        """Accepts the assignment without recording it in the graph."""
