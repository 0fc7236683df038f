"""Views of a parameter in a graph: which rows of it a matrix shows, and whether as columns."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from melora_fx.torch_private import in_one_storage

from .node import operator_name, parameter_of

_TRANSPOSITIONS = {"t", "T", "mT", "numpy_T", "transpose", "swapaxes", "swapdims", "permute", "movedim"}
_RESHAPES = {"unsqueeze", "squeeze", "expand", "view", "reshape", "_unsafe_view", "flatten", "unflatten"}
_CUTS = {"narrow", "slice", "split", "split_with_sizes", "chunk", "unbind", "select", "getitem"}
_VIEWS = _TRANSPOSITIONS | _RESHAPES | _CUTS
_COPIES = {"contiguous", "clone", "detach", "alias"}

CASTS = {"to", "_to_copy", "type_as", "float", "double", "half", "bfloat16"}
"""Names of the operators that change a tensor's dtype."""

_SAME_VALUES = _VIEWS | _COPIES | CASTS
"""Names of the operators behind which a weight is still the weight, or rows of it."""


def other_uses(reads: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> list[str]:
    """Names of the operators that use what the `get_attr` nodes `reads` give beside the linear `nodes`."""
    linear_nodes = set(nodes)
    found: dict[str, None] = {}
    pending = list(reads)
    while pending:
        for user in pending.pop().users:
            if user in linear_nodes:
                continue
            name = operator_name(user)
            if name in _SAME_VALUES:
                pending.append(user)
            else:
                found[name] = None
    return list(found)


@dataclass(frozen=True)
class WeightView:
    """A matrix in a graph that is a view of a parameter (R, C): its rows, or their transpose.

    `rows`: (start, stop) of the parameter's rows that the view shows. `is_transposed`: it shows them as columns.
    """

    parameter: str
    rows: tuple[int, int]
    is_whole: bool
    is_transposed: bool
    is_cast: bool


def view_of_parameter(value: Any, owner: nn.Module) -> WeightView | None:
    """The view of a 2-D parameter that `value` is, or None.

    The views on the way are carried out on a tensor without memory; sizes and strides then tell which rows it shows.
    """
    views: list[fx.Node] = []
    value = behind_views(value, views)
    parameter = parameter_of(value, owner, dim=2)
    if parameter is None:
        return None
    is_cast = any(operator_name(view) in CASTS for view in views)
    num_rows, num_columns = parameter.shape
    if all(operator_name(view) not in _VIEWS for view in views):
        return WeightView(str(value.target), (0, num_rows), True, False, is_cast)
    whole = torch.empty(num_rows, num_columns, device="meta")
    try:
        matrix = apply_views(views, whole)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return None
    found = _rows_shown(matrix, whole)
    if found is None:
        return None
    rows, is_transposed = found
    return WeightView(str(value.target), rows, rows == (0, num_rows), is_transposed, is_cast)


def is_view(node: fx.Node) -> bool:
    """Whether `node` is a view, a copy or a cast of its first argument."""
    return operator_name(node) in _SAME_VALUES and bool(node.args)


def behind_views(value: Any, views: list[fx.Node]) -> Any:
    """What the views, copies and casts that end in `value` begin with; they are added to `views`, last first."""
    while isinstance(value, fx.Node) and is_view(value):
        if operator_name(value) == "getitem" and isinstance(value.args[1], fx.Node):
            break  # a choice of rows by their numbers is no view
        views.append(value)
        value = value.args[0]
    return value


def apply_views(views: Sequence[fx.Node], tensor: torch.Tensor) -> Any:
    """What `views`, last first, make of `tensor`; what they raise for a tensor that they do not fit."""
    return functools.reduce(_apply_view, reversed(views), tensor)


def _apply_view(tensor: Any, node: fx.Node) -> Any:
    """What `node` makes of `tensor`; a symbolic size counts as 1."""
    if operator_name(node) not in _VIEWS:
        return tensor
    args, kwargs = fx.map_arg((node.args[1:], node.kwargs), lambda _: 1)
    if node.op == "call_method":
        return getattr(tensor, str(node.target))(*args, **kwargs)
    assert callable(node.target)
    return node.target(tensor, *args, **kwargs)


def _rows_shown(matrix: Any, whole: torch.Tensor) -> tuple[tuple[int, int], bool] | None:
    """Which rows of `whole` (R, C) the view `matrix` (…, a, b) shows, and whether as columns; None for other views."""
    if not isinstance(matrix, torch.Tensor) or matrix.dim() < 2:
        return None
    if not in_one_storage(matrix, whole):
        return None
    batch = zip(matrix.shape[:-2], matrix.stride()[:-2], strict=True)
    if any(size != 1 and stride != 0 for size, stride in batch):  # not one matrix, expanded
        return None
    num_columns = whole.size(1)
    sizes = matrix.shape[-2:]
    strides = matrix.stride()[-2:]
    for is_transposed, across, along in ((False, 0, 1), (True, 1, 0)):
        shows_columns = sizes[along] == num_columns and (num_columns == 1 or strides[along] == 1)
        shows_rows = sizes[across] == 1 or strides[across] == num_columns
        if shows_columns and shows_rows and matrix.storage_offset() % num_columns == 0:
            start = matrix.storage_offset() // num_columns
            return (start, start + sizes[across]), is_transposed
    return None
