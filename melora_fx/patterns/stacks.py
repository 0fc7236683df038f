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

from .node import operator_name, parameter_of
from .views import CASTS, apply_views, behind_views, is_view

_PRODUCTS = {
    *("mm", "matmul", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "linear", "tensordot"),
    *("_grouped_mm", "grouped_mm", "grouped_mm_fallback"),
}


def products_with(read: fx.Node) -> list[str]:
    """Names of the operators that multiply by what the `get_attr` node `read` gives, or by parts and views of it."""
    found: dict[str, None] = {}
    seen: set[fx.Node] = set()
    pending = [read]
    while pending:
        for user in pending.pop().users:
            name = operator_name(user)
            if name in _PRODUCTS:
                found[name] = None
            elif user not in seen and (is_view(user) or choice_of(user) is not None):
                seen.add(user)
                pending.append(user)
    return list(found)


@dataclass(frozen=True)
class Stack:
    """A stack in a graph, perhaps one matrix gathered for each row. `is_transposed`: it shows the transposes."""

    parameter: str
    is_transposed: bool
    is_cast: bool
    gather: fx.Node | None


def stack_of(value: Any, owner: nn.Module) -> Stack | None:
    """The stack that `value` shows whole, or matrices of it, with no other view than a transposition; or None."""
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
    for is_transposed, expected in ((False, whole), (True, whole.mT)):
        if (shown.shape, shown.stride()) == (expected.shape, expected.stride()):
            return Stack(str(value.target), is_transposed, is_cast, gather)
    return None


def choice_of(node: fx.Node) -> fx.Node | None:
    """The numbers by which `node` gathers along the first dimension, or None where it does something else."""
    if operator_name(node) not in ("index", "getitem") or len(node.args) < 2:
        return None
    index = node.args[1]
    if isinstance(index, list | tuple) and len(index) == 1:
        index = index[0]
    return index if isinstance(index, fx.Node) else None
