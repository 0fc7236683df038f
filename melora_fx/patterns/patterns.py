"""PATTERNS: every form of a linear in an FX graph of any origin; and the one walk that finds linears.

A linear node computes  y = x Wᵀ (+ b)  from a parameter W of the model: a matrix, a matrix stored in three dimensions,
or for each row one matrix of a stack. W may be on either side of the product, and may be reached through views
(transposed, expanded over a batch, cut into rows for q, k and v). A traced module and an exported program differ only
in the name of the node (`F.linear`, `addmm`, `@`, `einsum`, `aten.bmm`, …). A node whose weight is not a parameter is
not a linear node.
"""

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from melora_fx.capture.packed import run_base_forward
from melora_fx.names import get_attribute
from melora_fx.torch_private import GROUPED_MM

from .adapter_nodes import insert_adapter
from .einsum_terms import Orders, orders_of_linear, read_einsum
from .gathered_experts import insert_gathered, match_gathered
from .grouped_experts import insert_grouped, match_grouped
from .node import CALLS, KNOWN_SHAPE, LinearNode, Operands, Pattern, argument, operator_key, operator_name, pattern_name
from .stacks import matrix_in_three
from .views import CASTS, WeightView, known_view, view_of_parameter


def find_linear_nodes(graph: fx.Graph, owner: nn.Module) -> Iterator[LinearNode]:
    """Yields the linear nodes of `graph` in order; `owner` holds the parameters that its `get_attr` nodes name."""
    for node in graph.nodes:
        if node.op not in CALLS:
            continue
        for pattern in _BY_OPERATOR.get(operator_key(node), ()):
            linear = pattern.match(node, owner)
            if linear is not None:
                yield replace(linear, matched_by=pattern)
                break


def _match_linear(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    weight = argument(node, 1, "weight")
    linear = _linear_node(node, argument(node, 0, "input"), view_of_parameter(weight, owner))
    return _with_operands(linear, Operands(weight, argument(node, 2, "bias")), owner)


def _match_addmm(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    right = argument(node, 2, "mat2")
    linear = _match_baddbmm(node, owner)
    if node.kwargs.get("beta", 1) != 1 or (linear and linear.scale != 1):
        return linear
    return _with_operands(linear, Operands(right, argument(node, 0, "input", "self"), is_flipped=True), owner)


def _match_baddbmm(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, int | float):
        return None
    left, right = argument(node, 1, "mat1", "batch1", "mat"), argument(node, 2, "mat2", "batch2", "vec")
    linear = _match_product(node, owner, left, right)
    return linear and replace(linear, scale=alpha)


def _match_matmul(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    right = argument(node, 1, "mat2", "other", "tensor2", "vec")
    linear = _match_product(node, owner, argument(node, 0, "input", "self"), right)
    is_plain = _is_matrix_or_transpose(right)
    return _with_operands(linear, Operands(right, None, is_flipped=True), owner) if is_plain else linear


def _match_inner(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    return _linear_node(node, argument(node, 0, "input", "self"), view_of_parameter(argument(node, 1, "other"), owner))


def _match_product(node: fx.Node, owner: nn.Module, left: Any, right: Any) -> LinearNode | None:
    weight = view_of_parameter(right, owner)
    if weight is not None:  # x @ M: the weight of `F.linear` would be Mᵀ
        return _linear_node(node, left, replace(weight, is_transposed=not weight.is_transposed))
    linear = _linear_node(node, right, view_of_parameter(left, owner))
    return linear and replace(linear, input_is_transposed=True)


def _match_einsum(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    """Matches `…i,oi->…o` with any letters, with or without dots, and with operands and dimensions in any order.

    The rows or columns of a weight with three dimensions have two letters, as in `…i,ihd->…hd` and `…hd,ohd->…o`.
    """
    einsum = read_einsum(node.args)
    if einsum is None or not len(einsum.operands) == len(einsum.terms) == 2:
        return None
    for x, w in ((0, 1), (1, 0)):
        found = _einsum_weight(einsum.operands[w], einsum.terms[x], einsum.terms[w], einsum.output, owner)
        if found is not None:
            weight, orders = found
            linear = _linear_node(node, einsum.operands[x], weight)
            return linear and replace(linear, orders=orders if any(orders) else None)
    return None


def _einsum_weight(
    value: Any, x_term: str, w_term: str, output: str, owner: nn.Module
) -> tuple[WeightView, Orders] | None:
    """Returns the weight that `value` shows, laid out as for `F.linear`; None if this is no linear."""
    for row_dims in range(1, len(w_term)):
        rows, columns = w_term[:row_dims], w_term[row_dims:]
        orders = orders_of_linear(x_term, rows, columns, output)
        contracts_rows = orders is not None
        if orders is None and row_dims == 1:  # `…i,eoi->…eo` multiplies by every matrix of a stack
            orders = orders_of_linear(x_term, columns, rows, output)
        if orders is None:
            continue
        is_matrix = len(w_term) == 2
        weight = view_of_parameter(value, owner) if is_matrix else matrix_in_three(value, owner, row_dims)
        if weight is None:
            return None
        return replace(weight, is_transposed=weight.is_transposed ^ contracts_rows), orders
    return None


def _match_packed(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    x = node.args[1]
    assert isinstance(x, fx.Node), "of `packed_graph`"
    pattern = type(owner).__name__
    return LinearNode(node, x, "weight", pattern, weight_is_transposed=False, operands=Operands(None, None))


def _linear_node(node: fx.Node, input: Any, weight: WeightView | None) -> LinearNode | None:
    """Returns the linear node, given its weight as `F.linear` would need it; None if it is no linear."""
    if weight is None or not isinstance(input, fx.Node):
        return None
    if node.kwargs.get("out") is not None:  # readers of `out` would see the base's output
        return None
    return LinearNode(
        node=node,
        input=input,
        parameter=weight.parameter,
        pattern=pattern_name(node),
        weight_is_transposed=weight.is_transposed,
        rows=weight.columns if weight.is_transposed else weight.rows,
        columns=weight.rows if weight.is_transposed else weight.columns,
        weight_is_cast=weight.is_cast,
        row_dims=weight.row_dims,
    )


def _with_operands(linear: LinearNode | None, operands: Operands, owner: nn.Module) -> LinearNode | None:
    """Returns the linear, with its operands if `F.linear` computes the same bits from them."""
    is_part = linear is not None and (linear.rows or linear.columns)
    if linear is None or is_part or linear.input_is_transposed or not _is_vector(operands.bias, owner):
        return linear
    return replace(linear, operands=operands)


def _is_vector(bias: Any, owner: nn.Module) -> bool:
    """Returns whether a bias is absent or a parameter with one dimension, cast or not."""
    while isinstance(bias, fx.Node) and operator_name(bias) in CASTS and bias.args:
        bias = bias.args[0]
    if isinstance(bias, fx.Node) and KNOWN_SHAPE in bias.meta:
        return len(bias.meta[KNOWN_SHAPE]) == 1
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return bias is None
    return getattr(get_attribute(owner, str(bias.target)), "ndim", None) == 1


def _is_matrix_or_transpose(value: Any) -> bool:
    """Returns whether a factor is an unchanged tensor of the module, or one with its last two dimensions swapped."""
    known = known_view(value)
    if isinstance(known, WeightView):
        return known.is_plain
    if not isinstance(value, fx.Node):
        return False
    is_transposed = operator_name(value) in ("t", "T", "mT", "numpy_T", "transpose")
    read = value.args[0] if is_transposed and value.args else value
    return isinstance(read, fx.Node) and read.op == "get_attr"


_BMM = {torch.bmm, "aten.bmm.default", "bmm"}
_GROUPED_MM = {F.grouped_mm, GROUPED_MM, "aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}

PATTERNS = (
    Pattern({F.linear, "aten.linear.default"}, _match_linear, insert_adapter),
    Pattern({torch.addmm, "aten.addmm.default", "addmm"}, _match_addmm, insert_adapter),
    Pattern({torch.baddbmm, "aten.baddbmm.default", "baddbmm"}, _match_baddbmm, insert_adapter),
    Pattern({torch.matmul, "aten.matmul.default", operator.matmul, "matmul"}, _match_matmul, insert_adapter),
    Pattern({torch.mm, "aten.mm.default", "mm"} | _BMM, _match_matmul, insert_adapter),
    Pattern({torch.mv, "aten.mv.default", "mv"}, _match_matmul, insert_adapter),
    Pattern({torch.addmv, "aten.addmv.default", "addmv"}, _match_baddbmm, insert_adapter),
    Pattern({torch.inner, "aten.inner.default", "inner"}, _match_inner, insert_adapter),
    Pattern({torch.einsum, torch.functional.einsum, "aten.einsum.default"}, _match_einsum, insert_adapter),
    Pattern({run_base_forward}, _match_packed, insert_adapter),
    Pattern(_BMM, match_gathered, insert_gathered),
    Pattern(_GROUPED_MM, match_grouped, insert_grouped, is_aten=False),
)
"""Every form of a linear. If two share an operator, the first that matches counts."""

_BY_OPERATOR: dict[Any, list[Pattern]] = {}
for _pattern in PATTERNS:
    for _key in _pattern.operators:
        _BY_OPERATOR.setdefault(_key, []).append(_pattern)
