"""The one matcher: finds the linear nodes of an FX graph, whatever wrote them.

A linear node computes  y = x Wᵀ (+ b)  from a 2-D parameter W of the model. W may stand on either side of the product
and may be reached through transposes; what the node is called (`F.linear`, `addmm`, `@`, `aten.mm`, …) is all that
differs between a traced module and an exported program. A node whose weight is not a parameter is not a linear node.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearNode:
    """One call of a linear in a graph.

    `weight_is_transposed`: the parameter is stored (in_features, out_features), as in `Conv1D`.
    `input_is_transposed`: the product is W @ x, so input and output are (…, features, tokens).
    `weight_is_cast`: the parameter is cast on the way, so input and parameter may have different dtypes.
    """

    node: fx.Node
    input: fx.Node
    parameter: str
    pattern: str
    weight_is_transposed: bool
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


@dataclass(frozen=True)
class _Weight:
    parameter: str
    is_transposed: bool
    is_cast: bool


def _match_linear(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    input, weight = _argument(node, 0, "input"), _weight(_argument(node, 1, "weight"), owner)
    if weight is None or not isinstance(input, fx.Node):
        return None
    return LinearNode(node, input, weight.parameter, _name(node), weight.is_transposed, False, weight.is_cast)


def _match_addmm(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    if node.kwargs.get("alpha", 1) != 1:
        return None
    return _match_product(node, owner, _argument(node, 1, "mat1"), _argument(node, 2, "mat2"))


def _match_matmul(node: fx.Node, owner: nn.Module) -> LinearNode | None:
    right = _argument(node, 1, "mat2", "other", "tensor2")
    return _match_product(node, owner, _argument(node, 0, "input", "self"), right)


def _match_product(node: fx.Node, owner: nn.Module, left: Any, right: Any) -> LinearNode | None:
    weight = _weight(right, owner)
    if weight is not None and isinstance(left, fx.Node):
        return LinearNode(node, left, weight.parameter, _name(node), not weight.is_transposed, False, weight.is_cast)
    weight = _weight(left, owner)
    if weight is not None and isinstance(right, fx.Node):
        return LinearNode(node, right, weight.parameter, _name(node), weight.is_transposed, True, weight.is_cast)
    return None


def _weight(value: Any, owner: nn.Module) -> _Weight | None:
    """The 2-D parameter behind `value`, followed through transposes, or None."""
    is_transposed = is_cast = False
    while isinstance(value, fx.Node) and value.op != "get_attr":
        step = _view_of(value)
        if step is None:
            return None
        is_cast |= value.target in _CASTS
        value, flips = step
        is_transposed ^= flips
    if not isinstance(value, fx.Node):
        return None
    parameter = get_attribute(owner, str(value.target))
    if not isinstance(parameter, nn.Parameter) or parameter.dim() != 2:
        return None
    return _Weight(str(value.target), is_transposed, is_cast)


def _view_of(node: fx.Node) -> tuple[Any, bool] | None:
    """What a node is a view or a cast of, and whether it swaps the two dimensions; None for any other node."""
    source = _argument(node, 0, "input", "self")
    if node.target in _VIEWS or node.target in _CASTS:
        return source, False
    if node.target in _TRANSPOSES or (node.target is getattr and node.args[1] in ("T", "mT")):
        return source, True
    if node.target in _DIM_SWAPS:
        first, second = _argument(node, 1, "dim0"), _argument(node, 2, "dim1")
        return source, (first - second) % 2 == 1
    if node.target in _PERMUTES:
        first = _argument(node, 1, "dims")
        return source, (first if isinstance(first, int) else first[0]) % 2 == 1
    return None


def get_attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path below `module` ("" is `module` itself), or None where there is none."""
    value: Any = module
    for name in path.split(".") if path else ():
        value = getattr(value, name, None)
    return value


def _argument(node: fx.Node, index: int, *names: str) -> Any:
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return f"aten.{node.target.overloadpacket.__name__}"
    return "F.linear" if node.target in _LINEAR else str(getattr(node.target, "__name__", node.target))


_LINEAR = {F.linear, aten.linear.default}
_ADDMM = {torch.addmm, aten.addmm.default, "addmm"}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, aten.matmul.default, aten.mm.default, "matmul", "mm"}
_MATCHERS: dict[Any, Callable[[fx.Node, nn.Module], LinearNode | None]] = {
    **dict.fromkeys(_LINEAR, _match_linear),
    **dict.fromkeys(_ADDMM, _match_addmm),
    **dict.fromkeys(_MATMUL, _match_matmul),
}
_TRANSPOSES = {torch.t, "t", aten.t.default, aten.numpy_T.default, aten.mT.default}
_DIM_SWAPS = {torch.transpose, torch.swapaxes, "transpose", "swapaxes", "swapdims", aten.transpose.int}
_PERMUTES = {torch.permute, "permute", aten.permute.default}
_VIEWS = {
    "contiguous", "detach", aten.contiguous.default, aten.detach.default, aten.alias.default, aten.clone.default,
}  # fmt: skip
_CASTS = {
    "to", "type_as", "float", aten.type_as.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device,
    aten._to_copy.default,
}  # fmt: skip
