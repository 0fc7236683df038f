"""Recognises stacks of matrices in graphs, (E, O, I) or (E, I, O): the experts of a mixture.

Row s of an input belongs to one expert e:  y_s = W_e x_s.  `gathered_experts.py` and `grouped_experts.py` match the two
forms that transformers writes. The eager form, a loop over the chosen experts, depends on data, so it has no graph.

E experts, I in_features, O out_features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .node import operator_name, parameter_of, weight_of
from .views import CASTS, WeightView, apply_views, behind_views, known_view


@dataclass(frozen=True)
class Stack:
    """A parameter with three dimensions in a graph, usually a stack.

    Attributes:
        parameter: path of the parameter below its module.
        is_transposed: whether the graph reads the transposed matrices.
        is_cast: whether the parameter is cast first.
        gather: the node that gathers a matrix for each row, or None.
    """

    parameter: str
    is_transposed: bool
    is_cast: bool
    gather: fx.Node | None


def stack_of(value: Any, owner: nn.Module) -> Stack | None:
    """Returns the stack that `value` shows whole or gathers from, without views other than a transposition; or None."""
    known = known_view(value)
    if known is not None:
        return known if isinstance(known, Stack) else None
    views: list[fx.Node] = []
    gather: fx.Node | None = None
    value = behind_views(value, views)
    if isinstance(value, fx.Node) and choice_of(value) is not None:
        gather = value
        value = behind_views(gather.args[0], views)
    parameter = parameter_of(value, owner, dim=3)
    if parameter is None:
        return None
    whole = torch.empty(parameter.shape, device="meta")
    try:
        shown = apply_views(views, whole)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return None
    is_cast = any(operator_name(view) in CASTS for view in views)
    return stack_shown(str(value.target), shown, whole, is_cast=is_cast, gather=gather)


def matrix_in_three(value: Any, owner: nn.Module, row_dims: int) -> WeightView | None:
    """Returns the 3-D parameter that `value` shows whole, as a matrix whose rows are its first `row_dims` dimensions.

    Returns None for other values, and if the parameter is not contiguous.
    """
    found = stack_of(value, owner)
    if found is None or found.is_transposed or found.gather is not None:
        return None
    weight = weight_of(owner, found.parameter)
    if not weight.is_contiguous():
        return None
    return WeightView(found.parameter, False, found.is_cast, row_dims=row_dims)


def stack_shown(
    parameter: str, shown: Any, whole: torch.Tensor, *, is_cast: bool, gather: fx.Node | None = None
) -> Stack | None:
    """Returns the stack if `shown`, a view of `whole` (E, O, I), shows all of it, transposed or not; else None."""
    for is_transposed, expected in ((False, whole), (True, whole.mT)):
        if (shown.shape, shown.stride()) == (expected.shape, expected.stride()):
            return Stack(parameter, is_transposed, is_cast, gather)
    return None


def choice_of(node: fx.Node) -> fx.Node | None:
    """Returns the indices with which `node` gathers along the first dimension, or None if it does not gather."""
    if operator_name(node) not in ("index", "getitem") or len(node.args) < 2:
        return None
    index = node.args[1]
    if isinstance(index, list | tuple) and len(index) == 1:
        index = index[0]
    return index if isinstance(index, fx.Node) else None
