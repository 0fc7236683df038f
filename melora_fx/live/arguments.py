"""The functions that stand-ins are given to, by name, and their arguments."""

from collections.abc import Sequence
from typing import Any

import torch

from .shown import Standing

_OPERATORS = {"__matmul__": "matmul", "imatmul": "matmul", "__rmatmul__": "rmatmul", "__getitem__": "getitem"}
"""Methods of Python's syntax that have the meaning of another."""


def name_of(function: Any) -> str:
    """The name of a function, a method or an operator without what is around it: "getitem", "matmul", "T".

    Of a property Dynamo does not tell it: "get". That shows no values, as stand-ins have those that do of their own.
    """
    name = str(function.__name__)
    if name in _OPERATORS:
        return _OPERATORS[name]
    if name != "__get__":
        return name.split(".")[0]
    return "get" if torch.compiler.is_dynamo_compiling() else str(function.__self__.__name__)


def stand_ins(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The stand-ins among the arguments, in lists too."""
    found = [value for value in args if isinstance(value, Standing)]
    if kwargs:
        found += stand_ins(list(kwargs.values()), {})
    for value in args:
        if isinstance(value, list | tuple):  # Dynamo would take the `type` of a stand-in for the weight's from then on
            found += stand_ins(value, {})
    return found


def values(args: tuple[Any, ...]) -> list[Any]:
    """The arguments with weights in the place of stand-ins."""
    return [value_of(value) for value in args]


def value_of(value: Any) -> Any:
    if isinstance(value, Standing):
        return value.shown.value
    return type(value)(values(value)) if type(value) in (list, tuple) else value
