"""The matcher for mixtures of experts whose weights are one stack of matrices (E, O, I), or (E, I, O).

Row s of an input belongs to one expert e:  y_s = W_e x_s.  Two forms are found, as transformers writes them:

    "batched_mm":  bmm(stack[ids], x.unsqueeze(-1))     ids (S,): the expert of each row
    "grouped_mm":  grouped_mm(x, stackᵀ, offs)          offs (E,): where the rows of each expert end; x sorted by expert

and both with transposed stacks. The eager form, a loop over the experts that were chosen, depends on data: there is no
graph of it.

E experts, I in_features, O out_features, S rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .node import LinearNode, argument, operator_name, parameter_of, pattern_name
from .views import CASTS, apply_views, behind_views, is_view

_PRODUCTS = {"mm", "matmul", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "linear", "tensordot"}
_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


@dataclass(frozen=True)
class ExpertNode(LinearNode):
    """One product with a stack of matrices.

    `input`: (S, I), (S, I, 1) or (S, 1, I). `choice`: the experts of the rows (S,), or with `is_grouped` the ends of
    their groups (E,). `gather`: the node that gathers the rows' matrices; None where none are.
    """

    choice: fx.Node | None = None
    is_grouped: bool = False
    gather: fx.Node | None = None


def products_with(read: fx.Node) -> list[str]:
    """Names of the operators that multiply by what the `get_attr` node `read` gives, or by parts and views of it."""
    found: dict[str, None] = {}
    seen: set[fx.Node] = set()
    pending = [read]
    while pending:
        for user in pending.pop().users:
            name = operator_name(user)
            if name in _PRODUCTS or name in _GROUPED:
                found[name] = None
            elif user not in seen and (is_view(user) or _choice(user) is not None):
                seen.add(user)
                pending.append(user)
    return list(found)


def find_expert_nodes(graph: fx.Graph, owner: nn.Module) -> Iterator[ExpertNode]:
    """The products with stacks in `graph`, in order; `owner` holds the parameters that its `get_attr` nodes name."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = operator_name(node)
        expert: ExpertNode | None = None
        if name == "bmm":
            expert = _match_gathered(node, owner)
        elif name in _GROUPED:
            expert = _match_grouped(node, owner)
        if expert is not None:
            yield expert


@dataclass(frozen=True)
class _Stack:
    """A stack in a graph, perhaps one matrix gathered for each row. `is_transposed`: it shows the transposes."""

    parameter: str
    is_transposed: bool
    is_cast: bool
    gather: fx.Node | None


def _match_gathered(node: fx.Node, owner: nn.Module) -> ExpertNode | None:
    """`bmm(stack[ids], x (S, I, 1))`, or `bmm(x (S, 1, I), stack[ids])`."""
    left = argument(node, 0, "self", "input")
    right = argument(node, 1, "mat2")
    for stack_side, x, dims, is_left in ((left, right, (-1, 2), True), (right, left, (1, -2), False)):
        stack = _stack(stack_side, owner)
        if stack is None or stack.gather is None or not _is_row(x, dims):
            continue
        return ExpertNode(
            node=node,
            input=x,
            parameter=stack.parameter,
            pattern=pattern_name(node),
            weight_is_transposed=stack.is_transposed if is_left else not stack.is_transposed,
            weight_is_cast=stack.is_cast,
            choice=_choice(stack.gather),
            gather=stack.gather,
        )
    return None


def _match_grouped(node: fx.Node, owner: nn.Module) -> ExpertNode | None:
    """`grouped_mm(x (S, I), stack (E, I, O), offs (E,))`."""
    x = argument(node, 0, "self", "mat_a", "input")
    stack = _stack(argument(node, 1, "mat2", "mat_b", "weight"), owner)
    group_ends = argument(node, 2, "offs")
    bias = argument(node, 3, "bias")
    out_dtype = argument(node, 4, "out_dtype")
    if stack is None or stack.gather is not None or bias is not None or out_dtype is not None:
        return None
    if not isinstance(x, fx.Node) or not isinstance(group_ends, fx.Node):
        return None
    return ExpertNode(
        node=node,
        input=x,
        parameter=stack.parameter,
        pattern=pattern_name(node),
        weight_is_transposed=not stack.is_transposed,
        weight_is_cast=stack.is_cast,
        choice=group_ends,
        is_grouped=True,
    )


def _stack(value: Any, owner: nn.Module) -> _Stack | None:
    """The stack that `value` shows whole, or matrices of it, with no other view than a transposition; or None."""
    views: list[fx.Node] = []
    gather: fx.Node | None = None
    value = behind_views(value, views)
    if isinstance(value, fx.Node) and _choice(value) is not None:
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
            return _Stack(str(value.target), is_transposed, is_cast, gather)
    return None


def _choice(node: fx.Node) -> fx.Node | None:
    """The numbers by which `node` gathers along the first dimension, or None where it does something else."""
    if operator_name(node) not in ("index", "getitem") or len(node.args) < 2:
        return None
    index = node.args[1]
    if isinstance(index, list | tuple) and len(index) == 1:
        index = index[0]
    return index if isinstance(index, fx.Node) else None


def _is_row(x: Any, dims: tuple[int, int]) -> bool:
    """Whether `x` is made of one row for each matrix, by an `unsqueeze` of one of the dimensions `dims`."""
    return isinstance(x, fx.Node) and operator_name(x) == "unsqueeze" and argument(x, 1, "dim") in dims
