"""Finds modules that are worth a trace although they own no matrix: they may multiply by matrices that others own."""

import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_TABLE = "weight"
"""The name of an embedding's table."""


def reads_others(module: nn.Module) -> bool:
    """Returns whether the forward of `module` may multiply by a matrix whose owner does not: an item of a list or dict
    of parameters, or the table of an embedding.
    """
    children = list(module.children())
    if any(isinstance(child, nn.ParameterList | nn.ParameterDict) for child in children):
        return True
    has_tables = any(
        isinstance(child, nn.Embedding | nn.EmbeddingBag) for child in module.modules() if child is not module
    )
    return has_tables and any(_TABLE in names for names in _names_in_forward(module))


def _names_in_forward(module: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yields the names of attributes and globals in the forward of `module`, and in each method, property and function
    of the same file that it uses.
    """
    seen = set[types.CodeType]()
    pending: list[Any] = [inspect.getattr_static(module, "forward")]
    while pending:
        function = inspect.unwrap(_function_of(pending.pop()) or len)
        for code in _codes(getattr(function, "__code__", None)):
            if code in seen:
                continue
            seen.add(code)
            yield code.co_names
            for name in code.co_names:
                pending.append(inspect.getattr_static(module, name, None))
                pending.append(_own_function(function, name))


def _function_of(value: Any) -> Any:
    if isinstance(value, property):
        return value.fget
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    return value if isinstance(value, types.FunctionType) else None


def _own_function(function: Any, name: str) -> Any:
    """Returns the function of that name in the file of `function`, or None."""
    found = function.__globals__.get(name)
    is_own = isinstance(found, types.FunctionType) and found.__module__ == function.__module__
    return found if is_own else None


def _codes(code: Any) -> Iterator[types.CodeType]:
    """Yields `code` and the code of the functions inside it."""
    if not isinstance(code, types.CodeType):
        return
    yield code
    for constant in code.co_consts:
        yield from _codes(constant)
