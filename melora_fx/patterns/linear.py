"""The one matcher: finds the linear nodes of an FX graph, whatever wrote them.

A linear node computes  y = x Wᵀ (+ b)  from a 2-D parameter W of the model. W may stand on either side of the product,
be reached through views (transposed, expanded over a batch, cut into rows for q, k and v), and what the node is called
(`F.linear`, `addmm`, `@`, `einsum`, `aten.bmm`, …) is all that differs between a traced module and an exported program.
A node whose weight is not a parameter is not a linear node.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from melora_fx.capture.packed import is_packed_linear, packed_weight, run_base_forward

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearNode:
    """One call of a linear in a graph.

    `weight_is_transposed`: the parameter is stored (in_features, out_features), as in `Conv1D`.
    `rows`: (start, stop) where the node multiplies by some rows of the parameter only; None for the whole.
    `input_is_transposed`: the product is W @ x, so input and output are (…, features, tokens).
    `weight_is_cast`: the parameter is cast on the way, so input and parameter may have different dtypes.
    """

    node: fx.Node
    input: fx.Node
    parameter: str
    pattern: str
    weight_is_transposed: bool
    rows: tuple[int, int] | None = None
    input_is_transposed: bool = False
    weight_is_cast: bool = False


def find_linear_nodes(graph: fx.Graph, owner: nn.Module) -> Iterator[LinearNode]:
    """The linear nodes of `graph` in order; `owner` holds the parameters that its `get_attr` nodes name."""
    for node in graph.nodes:
        matcher = _MATCHERS.get(node.target) if node.op in ("call_function", "call_method") else None
        if matcher is None:
            continue
        linear = matcher(node, owner)
        if linear is not None:
            yield linear


def other_uses(reads: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> list[str]:
    """Names of the operators that use what the `get_attr` nodes `reads` give beside the linear `nodes`."""
    linear_nodes, found = set(nodes), dict[str, None]()
    pending = list(reads)
    while pending:
        for user in pending.pop().users:
            if user in linear_nodes:
                continue
            if operator_name(user) in _VIEWS | _COPIES | CASTS:
                pending.append(user)
            else:
                found[operator_name(user)] = None
    return list(found)


def weight_of(module: nn.Module, path: str) -> torch.Tensor:
    """The parameter at `path` below `module`; of a packed linear what stands for it."""
    owner = get_attribute(module, path.rpartition(".")[0])
    return packed_weight(owner) if is_packed_linear(owner) else get_attribute(module, path)


@dataclass(frozen=True)
class _Weight:
    """A matrix in a graph that is a view of a parameter (R, C): its rows, or their transpose.

    `rows`: (start, stop) of the parameter's rows that the view shows. `is_transposed`: it shows them as columns.
    """

    parameter: str
    rows: tuple[int, int]
    is_whole: bool
    is_transposed: bool
    is_cast: bool


def _match_linear(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    return _linear_node(node, argument(node, 0, "input"), _weight(argument(node, 1, "weight"), owner))


def _match_addmm(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    if node.kwargs.get("alpha", 1) != 1:
        return None
    return _match_product(node, owner, argument(node, 1, "mat1", "batch1"), argument(node, 2, "mat2", "batch2"))


def _match_matmul(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    right = argument(node, 1, "mat2", "other", "tensor2")
    return _match_product(node, owner, argument(node, 0, "input", "self"), right)


def _match_product(node: fx.Node, owner: nn.Module, left: Any, right: Any) -> LinearNode | None:
    weight = _weight(right, owner)
    if weight is not None:  # x @ M: what linear would take is Mᵀ
        return _linear_node(node, left, replace(weight, is_transposed=not weight.is_transposed))
    return _linear_node(node, right, _weight(left, owner), input_is_transposed=True)


def _match_einsum(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    """`…i,oi->…o` in any letters and order of operands: the contracted letter and the new one come last."""
    operands: Any = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
    inputs, _, output = str(node.args[0]).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not len(operands) == len(terms) == 2:
        return None
    for x, x_term, w, w_term in (
        (operands[0], terms[0], operands[1], terms[1]),
        (operands[1], terms[1], operands[0], terms[0]),
    ):
        weight, contracted = _weight(w, owner), x_term[-1:]
        new = w_term.replace(contracted, "")
        if weight is None or len(w_term) != 2 or len(new) != 1 or len(set(x_term + new)) != len(x_term) + 1:
            continue
        if output != x_term[:-1] + new:
            continue
        is_transposed = weight.is_transposed ^ (w_term[0] == contracted)
        return _linear_node(node, x, replace(weight, is_transposed=is_transposed))
    return None


def _match_packed(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    x = node.args[1]
    assert isinstance(x, fx.Node), "of `packed_graph`"
    return LinearNode(node, x, "weight", type(owner).__name__, False)


def _linear_node(
    node: fx.Node, input: Any, weight: _Weight | None, *, input_is_transposed: bool = False
) -> LinearNode | None:
    """The node, where `weight` is the matrix that `F.linear` would take; some rows only where they are outputs."""
    if weight is None or not isinstance(input, fx.Node) or (weight.is_transposed and not weight.is_whole):
        return None
    rows, name = None if weight.is_whole else weight.rows, pattern_name(node)
    return LinearNode(
        node, input, weight.parameter, name, weight.is_transposed, rows, input_is_transposed, weight.is_cast
    )


def _weight(value: Any, owner: nn.Module) -> _Weight | None:
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
        return _Weight(str(value.target), (0, num_rows), True, False, is_cast)
    whole = torch.empty(num_rows, num_columns, device="meta")
    try:
        matrix = apply_views(views, whole)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return None
    found = _rows_shown(matrix, whole)
    if found is None:
        return None
    rows, is_transposed = found
    return _Weight(str(value.target), rows, rows == (0, num_rows), is_transposed, is_cast)


def is_view(node: fx.Node) -> bool:
    """Whether `node` is a view, a copy or a cast of its first argument."""
    return operator_name(node) in _VIEWS | _COPIES | CASTS and bool(node.args)


def behind_views(value: Any, views: list[fx.Node]) -> Any:
    """What the views, copies and casts that end in `value` begin with; they are added to `views`, last first."""
    while isinstance(value, fx.Node) and is_view(value):
        if operator_name(value) == "getitem" and isinstance(value.args[1], fx.Node):
            break  # a choice of rows by their numbers is no view
        views.append(value)
        value = value.args[0]
    return value


def parameter_of(value: Any, owner: nn.Module, *, dim: int) -> nn.Parameter | None:
    """The parameter of `dim` dimensions that a `get_attr` node gives, or None."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    parameter = get_attribute(owner, str(value.target))
    return parameter if isinstance(parameter, nn.Parameter) and parameter.dim() == dim else None


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
    if matrix.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        return None
    if any(size != 1 and stride != 0 for size, stride in zip(matrix.shape[:-2], matrix.stride()[:-2], strict=True)):
        return None
    num_columns = whole.size(1)
    sizes, strides = matrix.shape[-2:], matrix.stride()[-2:]
    for is_transposed, across, along in ((False, 0, 1), (True, 1, 0)):
        shows_columns = sizes[along] == num_columns and (num_columns == 1 or strides[along] == 1)
        shows_rows = sizes[across] == 1 or strides[across] == num_columns
        if shows_columns and shows_rows and matrix.storage_offset() % num_columns == 0:
            start = matrix.storage_offset() // num_columns
            return (start, start + sizes[across]), is_transposed
    return None


def get_attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path below `module` ("" is `module` itself), or None where there is none."""
    value: Any = module
    for name in path.split(".") if path else ():
        value = getattr(value, name, None)
    return value


def argument(node: fx.Node, index: int, *names: str) -> Any:
    """The argument at a position or under one of its names; None where it is not given."""
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def pattern_name(node: fx.Node) -> str:
    """What a report calls the node's operator: "F.linear", "aten.bmm", …"""
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{operator_name(node)}"
    return "F.linear" if node.target in LINEAR else operator_name(node)


def operator_name(node: fx.Node) -> str:
    """A node's operator without its namespace and overload: "transpose", for each way to call it."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    if node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "__name__", node.target))


LINEAR = {F.linear, aten.linear.default}
_ADDMM = {torch.addmm, aten.addmm.default, "addmm", torch.baddbmm, aten.baddbmm.default, "baddbmm"}
_MATMUL = {
    torch.matmul, torch.mm, torch.bmm, operator.matmul, "matmul", "mm", "bmm",
    aten.matmul.default, aten.mm.default, aten.bmm.default,
}  # fmt: skip
_EINSUM = {torch.einsum, torch.functional.einsum, aten.einsum.default}
_MATCHERS: dict[Any, Callable[[fx.Node, nn.Module], LinearNode | None]] = {
    **dict.fromkeys(LINEAR, _match_linear),
    **dict.fromkeys(_ADDMM, _match_addmm),
    **dict.fromkeys(_MATMUL, _match_matmul),
    **dict.fromkeys(_EINSUM, _match_einsum),
    run_base_forward: _match_packed,
}
_VIEWS = {
    "t", "T", "mT", "numpy_T", "transpose", "swapaxes", "swapdims", "permute", "movedim", "unsqueeze", "squeeze",
    "expand", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "narrow", "slice", "split", "split_with_sizes",
    "chunk", "unbind", "select", "getitem",
}  # fmt: skip
_COPIES = {"contiguous", "clone", "detach", "alias"}
CASTS = {"to", "_to_copy", "type_as", "float", "double", "half", "bfloat16"}
