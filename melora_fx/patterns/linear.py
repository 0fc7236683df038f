"""The one matcher: finds the linear nodes of an FX graph, whatever wrote them.

A linear node computes  y = x Wᵀ (+ b)  from a 2-D parameter W of the model. W may stand on either side of the product,
be reached through views (transposed, expanded over a batch, cut into rows for q, k and v), and what the node is called
(`F.linear`, `addmm`, `@`, `einsum`, `aten.bmm`, …) is all that differs between a traced module and an exported program.
A node whose weight is not a parameter is not a linear node.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from melora_fx.capture.packed import run_base_forward

from .node import LINEAR, LinearNode, argument, aten, pattern_name
from .views import WeightView, view_of_parameter


def find_linear_nodes(graph: fx.Graph, owner: nn.Module) -> Iterator[LinearNode]:
    """The linear nodes of `graph` in order; `owner` holds the parameters that its `get_attr` nodes name."""
    for node in graph.nodes:
        matcher = _MATCHERS.get(node.target) if node.op in ("call_function", "call_method") else None
        if matcher is None:
            continue
        linear = matcher(node, owner)
        if linear is not None:
            yield linear


def _match_linear(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    return _linear_node(node, argument(node, 0, "input"), view_of_parameter(argument(node, 1, "weight"), owner))


def _match_addmm(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    if node.kwargs.get("alpha", 1) != 1:
        return None
    return _match_product(node, owner, argument(node, 1, "mat1", "batch1"), argument(node, 2, "mat2", "batch2"))


def _match_matmul(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    right = argument(node, 1, "mat2", "other", "tensor2")
    return _match_product(node, owner, argument(node, 0, "input", "self"), right)


def _match_product(node: fx.Node, owner: nn.Module, left: Any, right: Any) -> LinearNode | None:
    weight = view_of_parameter(right, owner)
    if weight is not None:  # x @ M: what linear would take is Mᵀ
        return _linear_node(node, left, replace(weight, is_transposed=not weight.is_transposed))
    return _linear_node(node, right, view_of_parameter(left, owner), input_is_transposed=True)


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
        weight, contracted = view_of_parameter(w, owner), x_term[-1:]
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
    node: fx.Node, input: Any, weight: WeightView | None, *, input_is_transposed: bool = False
) -> LinearNode | None:
    """The node, where `weight` is the matrix that `F.linear` would take; some rows only where they are outputs."""
    if weight is None or not isinstance(input, fx.Node) or (weight.is_transposed and not weight.is_whole):
        return None
    rows, name = None if weight.is_whole else weight.rows, pattern_name(node)
    return LinearNode(
        node, input, weight.parameter, name, weight.is_transposed, rows, input_is_transposed, weight.is_cast
    )


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
