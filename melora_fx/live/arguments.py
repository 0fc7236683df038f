"""Names the functions that stand-ins are passed to, and finds the stand-ins among their arguments."""

from collections.abc import Sequence
from typing import Any

import torch

from .shown import Standing

_OPERATORS = {"__matmul__": "matmul", "imatmul": "matmul", "__rmatmul__": "rmatmul", "__getitem__": "getitem"}
"""Methods behind Python's operators → the name of the function with the same meaning."""


def name_of(function: Any) -> str:
    """Returns the bare name of a function, a method, an operator or a property: "getitem", "matmul", "T".

    Dynamo hides the name of a property, so the result is "get" under Dynamo. Such a property shows no values, since
    stand-ins define the properties that do themselves.
    """
    name = str(function.__name__)
    if name in _OPERATORS:
        return _OPERATORS[name]
    if name != "__get__":
        return name.split(".")[0]
    return "get" if torch.compiler.is_dynamo_compiling() else str(function.__self__.__name__)


def stand_ins(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Returns the stand-ins among the arguments, also those in lists and tuples."""
    found = [value for value in args if isinstance(value, Standing)]
    if kwargs:
        found += stand_ins(list(kwargs.values()), {})
    for value in args:
        if isinstance(value, list | tuple):  # `type(value)` would make Dynamo treat a stand-in as a weight from then on
            found += stand_ins(value, {})
    return found


def values(args: tuple[Any, ...]) -> list[Any]:
    """Returns the arguments with every stand-in replaced by the tensor that it shows."""
    return [value_of(value) for value in args]


def value_of(value: Any) -> Any:
    if isinstance(value, Standing):
        return value.shown.value
    return type(value)(values(value)) if type(value) in (list, tuple) else value
