"""Products with a stack of matrices, the experts of a mixture: (E, O, I), or (E, I, O).

Row s of an input belongs to one expert e:  y_s = W_e x_s.  `gathered_experts.py` and `grouped_experts.py` have the two
forms, as transformers writes them. The eager form, a loop over the experts that were chosen, depends on data: there is
no graph of it.

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
    """A parameter of three dimensions in a graph, most often a stack, perhaps with one matrix gathered for each row.
    `is_transposed`: it shows the transposes.
    """

    parameter: str
    is_transposed: bool
    is_cast: bool
    gather: fx.Node | None


def stack_of(value: Any, owner: nn.Module) -> Stack | None:
    """The stack that `value` shows whole, or matrices of it, with no other view than a transposition; or None."""
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
    """The parameter of three dimensions that `value` shows whole, as the matrix whose rows are `row_dims` of them; None
    for other values, and for one whose other dimensions do not lie side by side.
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
    """What `shown`, made by views of `whole` (E, O, I), shows of a stack of that shape; None for other views."""
    for is_transposed, expected in ((False, whole), (True, whole.mT)):
        if (shown.shape, shown.stride()) == (expected.shape, expected.stride()):
            return Stack(parameter, is_transposed, is_cast, gather)
    return None


def choice_of(node: fx.Node) -> fx.Node | None:
    """The numbers by which `node` gathers along the first dimension, or None where it does something else."""
    if operator_name(node) not in ("index", "getitem") or len(node.args) < 2:
        return None
    index = node.args[1]
    if isinstance(index, list | tuple) and len(index) == 1:
        index = index[0]
    return index if isinstance(index, fx.Node) else None
