"""Views of a parameter in a graph: which of its rows and columns a matrix shows, and whether transposed."""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from melora_fx.torch_private import in_one_storage

from .node import operator_name, parameter_of

KNOWN_VIEW = "melora_view"
"""Key in `node.meta` of an input that is a view of a weight; the value is a WeightView or a Stack."""

_TRANSPOSITIONS = {"t", "T", "mT", "numpy_T", "transpose", "swapaxes", "swapdims", "permute", "movedim"}
_RESHAPES = {"unsqueeze", "squeeze", "expand", "view", "reshape", "_unsafe_view", "flatten", "unflatten"}
CUTS = {"narrow", "slice", "split", "split_with_sizes", "chunk", "unbind", "select", "getitem"}
VIEWS = _TRANSPOSITIONS | _RESHAPES | CUTS
COPIES = {"contiguous", "clone", "alias"}

CASTS = {"to", "_to_copy", "type_as", "float", "double", "half", "bfloat16"}
"""Names of the operators that change a tensor's dtype."""

HARMLESS_PROPERTIES = {
    *("dtype", "device", "layout", "shape", "ndim", "nbytes", "itemsize", "names", "grad", "grad_fn"),
    *("is_leaf", "is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_nested", "requires_grad"),
}

HARMLESS = {
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "get_device"),
    *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_shared", "is_pinned"),
    *("is_same_size", "is_set_to", "is_distributed", "is_coalesced", "is_conj", "is_neg", "_is_view", "_is_zerotensor"),
    *("__len__", "__hash__", "__repr__", "data_ptr", "untyped_storage"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "result_type"),
}
"""Functions and methods that reveal nothing about a tensor's values."""

HARMLESS_AS_SECOND = {"to", "type_as", "view_as", "reshape_as", "expand_as"}
"""Methods that read only the shape, the dtype or the device of their argument."""

_SAME_VALUES = VIEWS | COPIES | CASTS
"""Names of the operators whose output still shows the weight, or a part of it."""


def other_uses(reads: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> list[str]:
    """Returns the names of the operators that use the parameters that the `get_attr` nodes `reads` read.

    The linear `nodes` do not count, unless they use the parameter in more than their weight argument.
    """
    linear_nodes = dict.fromkeys(nodes, 0)
    found: dict[str, None] = {}
    pending = list(reads)
    while pending:
        node = pending.pop()
        for user in node.users:
            name = operator_name(user)
            if user in linear_nodes:
                linear_nodes[user] += num_arguments(user, node)
                if linear_nodes[user] > 1:
                    found[name] = None
            elif is_harmless_use(user, node):
                continue
            elif name in _SAME_VALUES:
                pending.append(user)
            else:
                found[name] = None
    return list(found)


def is_harmless_use(user: fx.Node, node: fx.Node) -> bool:
    """Returns whether `user` reads only what kind of tensor `node` is, not its values."""
    name = operator_name(user)
    is_first = bool(user.args) and user.args[0] is node
    return name in HARMLESS_PROPERTIES or is_harmless(name, is_first=is_first)


def is_harmless(name: str, *, is_first: bool) -> bool:
    """Returns whether the function `name` reads no values of its first argument (`is_first`), or of another one."""
    return name in HARMLESS or (name in HARMLESS_AS_SECOND and not is_first)


def num_arguments(user: fx.Node, node: fx.Node) -> int:
    """Returns how many arguments of `user` are `node`."""
    count = 0

    def look(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    fx.map_arg((user.args, user.kwargs), look)
    return count


@dataclass(frozen=True)
class WeightView:
    """A matrix in a graph that is a view of a parameter (R, C): the whole, a part, or a transpose of either.

    Attributes:
        parameter: path of the parameter below its module.
        is_transposed: whether the view shows rows as columns.
        is_cast: whether the parameter is cast on the way.
        rows, columns: (start, stop) of the parameter's rows and columns that the view shows; None for all.
        is_plain: whether the view is known to be the parameter itself or its transpose, neither cast nor copied.
        row_dims: for a parameter with three dimensions, how many of them form R; else None.
    """

    parameter: str
    is_transposed: bool
    is_cast: bool
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    is_plain: bool = False
    row_dims: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.rows is None and self.columns is None


def view_of_parameter(value: Any, owner: nn.Module) -> WeightView | None:
    """Returns `value` as a view of a 2-D parameter, or of a 3-D parameter flattened to a matrix; or None.

    Applies the views in between to a tensor without memory, whose sizes and strides then show the rows and columns.
    """
    known = known_view(value)
    if known is not None:
        return known if isinstance(known, WeightView) else None
    views: list[fx.Node] = []
    value = behind_views(value, views)
    parameter = parameter_of(value, owner, dim=2)
    if parameter is None:
        parameter = parameter_of(value, owner, dim=3)
        if parameter is None or min(parameter.shape) == 1 or not parameter.is_contiguous():
            return None
    is_cast = any(operator_name(view) in CASTS for view in views)
    if any(is_chosen_by_input(view) for view in views):
        return None
    if parameter.dim() == 2 and all(operator_name(view) not in VIEWS for view in views):
        return WeightView(str(value.target), False, is_cast)
    whole = torch.empty(parameter.shape, device="meta")
    try:
        matrix = apply_views(views, whole)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return None
    if not isinstance(matrix, torch.Tensor) or not in_one_storage(matrix, whole):
        return None
    return view_shown(str(value.target), matrix, int(matrix.storage_offset()), parameter.shape, is_cast=is_cast)


def view_shown(
    parameter: str, matrix: torch.Tensor, offset: int, shape: Sequence[int], *, is_cast: bool, is_copy: bool = False
) -> WeightView | None:
    """Returns which part of a parameter `matrix` shows.

    `matrix` is a view of a contiguous tensor of `shape` and begins after `offset` elements. Returns None if it is
    neither a block of rows and columns nor the transpose of one, or if it shows only a part of a 3-D parameter.
    """
    if len(shape) == 3:
        for row_dims in (1, 2):
            sides = (math.prod(shape[:row_dims]), math.prod(shape[row_dims:]))
            flat = view_shown(parameter, matrix, offset, sides, is_cast=is_cast, is_copy=is_copy)
            if flat is not None and flat.is_whole:
                return replace(flat, row_dims=row_dims)
        return None
    found = block_shown(matrix, offset, shape[1])
    if found is None:
        return None
    rows, columns, is_transposed = found
    is_whole = rows == (0, shape[0]) and columns == (0, shape[1])
    is_plain = is_whole and matrix.dim() == 2 and not is_cast and not is_copy
    return WeightView(
        parameter,
        is_transposed,
        is_cast,
        rows=None if rows == (0, shape[0]) else rows,
        columns=None if columns == (0, shape[1]) else columns,
        is_plain=is_plain,
    )


def known_view(value: Any) -> Any:
    """Returns the KNOWN_VIEW of a node, or None."""
    return value.meta.get(KNOWN_VIEW) if isinstance(value, fx.Node) else None


def is_view(node: fx.Node) -> bool:
    """Returns whether `node` is a view, a copy or a cast of its first argument."""
    return operator_name(node) in _SAME_VALUES and bool(node.args)


def is_chosen_by_input(view: fx.Node) -> bool:
    """Returns whether a computed value decides which rows or columns a view shows."""
    found: list[fx.Node] = []
    fx.map_arg((view.args[1:], view.kwargs), found.append)
    return operator_name(view) in CUTS and bool(found)


def behind_views(value: Any, views: list[fx.Node]) -> Any:
    """Returns the source of the views, copies and casts that end in `value`; appends them to `views`, last first."""
    while isinstance(value, fx.Node) and is_view(value):
        if operator_name(value) == "getitem" and isinstance(value.args[1], fx.Node):
            break  # a choice of rows by index is no view
        views.append(value)
        value = value.args[0]
    return value


def apply_views(views: Sequence[fx.Node], tensor: torch.Tensor) -> Any:
    """Returns `tensor` after `views`, which are last first; raises what they raise if they do not fit it."""
    return functools.reduce(_apply_view, reversed(views), tensor)


def _apply_view(tensor: Any, node: fx.Node) -> Any:
    """Returns `tensor` after the view `node`; a symbolic size counts as 1."""
    if operator_name(node) not in VIEWS:
        return tensor
    args, kwargs = fx.map_arg((node.args[1:], node.kwargs), lambda _: 1)
    if node.op == "call_method":
        return getattr(tensor, str(node.target))(*args, **kwargs)
    assert callable(node.target)
    return node.target(tensor, *args, **kwargs)


def block_shown(
    matrix: torch.Tensor, offset: int, num_columns: int
) -> tuple[tuple[int, int], tuple[int, int], bool] | None:
    """Returns which rows and columns of a contiguous tensor (R, C) its view `matrix` (…, a, b) shows, and whether it
    shows them transposed; None for other views. The view begins after `offset` elements; `num_columns` is C.
    """
    if matrix.dim() < 2:
        return None
    batch = zip(matrix.shape[:-2], matrix.stride()[:-2], strict=True)
    if any(size != 1 and stride != 0 for size, stride in batch):  # not one expanded matrix
        return None
    sizes = matrix.shape[-2:]
    strides = matrix.stride()[-2:]
    row, column = divmod(offset, max(num_columns, 1))
    for is_transposed, across, along in ((False, 0, 1), (True, 1, 0)):
        shows_columns = sizes[along] == 1 or strides[along] == 1
        shows_rows = sizes[across] == 1 or strides[across] == num_columns
        if shows_columns and shows_rows and column + sizes[along] <= num_columns:
            return (row, row + sizes[across]), (column, column + sizes[along]), is_transposed
    return None
