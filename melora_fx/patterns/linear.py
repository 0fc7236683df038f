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
    for x, w in ((0, 1), (1, 0)):
        weight = view_of_parameter(operands[w], owner)
        if weight is None or not _is_product(terms[x], terms[w], output):
            continue
        contracts_first = terms[w][0] == terms[x][-1]
        is_transposed = weight.is_transposed ^ contracts_first
        return _linear_node(node, operands[x], replace(weight, is_transposed=is_transposed))
    return None


def _is_product(x_term: str, w_term: str, output: str) -> bool:
    """Whether the last letter of `x_term` is contracted with a matrix, whose other letter is new and comes last."""
    new = w_term.replace(x_term[-1:], "")
    has_new_letter = len(w_term) == 2 and len(new) == 1
    letters_differ = len(set(x_term + new)) == len(x_term) + 1
    return has_new_letter and letters_differ and output == x_term[:-1] + new


def _match_packed(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    x = node.args[1]
    assert isinstance(x, fx.Node), "of `packed_graph`"
    return LinearNode(node, x, parameter="weight", pattern=type(owner).__name__, weight_is_transposed=False)


def _linear_node(
    node: fx.Node, input: Any, weight: WeightView | None, *, input_is_transposed: bool = False
) -> LinearNode | None:
    """The node, where `weight` is the matrix that `F.linear` would take; some rows only where they are outputs."""
    if weight is None or not isinstance(input, fx.Node) or (weight.is_transposed and not weight.is_whole):
        return None
    return LinearNode(
        node=node,
        input=input,
        parameter=weight.parameter,
        pattern=pattern_name(node),
        weight_is_transposed=weight.is_transposed,
        rows=None if weight.is_whole else weight.rows,
        input_is_transposed=input_is_transposed,
        weight_is_cast=weight.is_cast,
    )


_ADDMM = {torch.addmm, aten.addmm.default, "addmm", torch.baddbmm, aten.baddbmm.default, "baddbmm"}
_MATMUL = {torch.matmul, aten.matmul.default, operator.matmul, "matmul"}
_MM = {torch.mm, aten.mm.default, "mm", torch.bmm, aten.bmm.default, "bmm"}
_EINSUM = {torch.einsum, torch.functional.einsum, aten.einsum.default}

_MATCHERS: dict[Any, Callable[[fx.Node, nn.Module], LinearNode | None]] = {
    **dict.fromkeys(LINEAR, _match_linear),
    **dict.fromkeys(_ADDMM, _match_addmm),
    **dict.fromkeys(_MATMUL | _MM, _match_matmul),
    **dict.fromkeys(_EINSUM, _match_einsum),
    run_base_forward: _match_packed,
}
"""Target of a node → what makes a linear node of it: operators, functions, and names of methods."""
