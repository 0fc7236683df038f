"""LinearNode, the result of the matchers: one call of a linear in a graph; and helpers that read nodes."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn import functional as F

from melora_fx.adapter.site import SiteRecord
from melora_fx.capture.packed import is_packed_linear, packed_weight
from melora_fx.names import get_attribute
from melora_fx.torch_private import is_operator, is_packet

from .einsum_terms import Orders

CALLS = ("call_function", "call_method")
"""The values of `node.op` for nodes that call an operator."""


KNOWN_SHAPE = "melora_shape"
"""Key in `node.meta` of an input whose shape is known, in the graph of a product that a module's forward computes."""


class Pattern(NamedTuple):
    """One way in which graphs multiply by a parameter, and how an adapter is inserted behind it.

    Attributes:
        operators: the results of `operator_key` for nodes that may match.
        match: returns the linear that a node computes, or None if the node only looks like one; the module is the one
            whose parameters the graph's `get_attr` nodes name.
        insert: inserts an adapter's nodes behind a matched node, given the weight.
        is_aten: whether the inserted nodes are ATen only, as forward-mode derivatives and ONNX need.
    """

    operators: Set[Any]
    match: Callable[[fx.Node, nn.Module], "LinearNode | None"]
    insert: Callable[[fx.Graph, "LinearNode", SiteRecord, Tensor], None]
    is_aten: bool = True


class Operands(NamedTuple):
    """The operands with which `F.linear` computes the same bits.

    Attributes:
        weight: None for a packed linear, because only its own forward can read the weight.
        bias: None if there is none.
        is_flipped: whether `weight` is (in_features, out_features), so that `F.linear` needs its transpose.
    """

    weight: fx.Node | None
    bias: fx.Node | None
    is_flipped: bool = False


@dataclass(frozen=True)
class LinearNode:
    """One call of a linear in a graph: a product with a matrix, or with a stack of matrices, the experts of a mixture.

    Attributes:
        node: the node that computes the product.
        input: the node that the weight is multiplied with.
        parameter: path of the weight below the module that owns the graph's parameters.
        pattern: its name in reports.
        weight_is_transposed: whether the parameter is stored as (in_features, out_features), as in `Conv1D`.
        rows: (start, stop) of the outputs, if the node multiplies by a part of the parameter; None for all.
        columns: (start, stop) of the inputs, likewise.
        input_is_transposed: whether the product is W @ x, so that input and output are (…, features, tokens).
        orders: how to reorder the dimensions if the features are not the last ones; None if they are.
        scale: a factor of the product: the `alpha` of `addmm`.
        weight_is_cast: whether the parameter is cast first, so that its dtype may differ from the input's.
        operands: those of an `F.linear` with the same bits; None if it cannot compute these from the whole weight.
        choice: for a stack, the experts of the rows (S,), or the ends of the experts' groups of rows (E,).
        gather: for a stack, the node that gathers a matrix for each row; None if there is none.
        row_dims: for one matrix stored in three dimensions, how many of them are its rows; else None.
        matched_by: the entry of PATTERNS that matched it.
    """

    node: fx.Node
    input: fx.Node
    parameter: str
    pattern: str
    weight_is_transposed: bool
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    input_is_transposed: bool = False
    orders: Orders | None = None
    scale: float = 1
    weight_is_cast: bool = False
    operands: Operands | None = None
    choice: fx.Node | None = None
    gather: fx.Node | None = None
    row_dims: int | None = None
    matched_by: Pattern | None = None


def weight_of(module: nn.Module, path: str) -> Tensor:
    """Returns the parameter at `path` below `module`; for a packed linear, its stand-in without values."""
    owner = get_attribute(module, path.rpartition(".")[0])
    return packed_weight(owner) if is_packed_linear(owner) else get_attribute(module, path)


def parameter_of(value: Any, owner: nn.Module, *, dim: int) -> nn.Parameter | None:
    """Returns the parameter with `dim` dimensions that a `get_attr` node reads, or None."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    parameter = get_attribute(owner, str(value.target))
    return parameter if isinstance(parameter, nn.Parameter) and parameter.dim() == dim else None


def argument(node: fx.Node, index: int, *names: str) -> Any:
    """Returns the argument at a position or under one of its names; None if it is not passed."""
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def pattern_name(node: fx.Node) -> str:
    """Returns the name of the node's operator in reports: "F.linear", "aten.bmm", …"""
    if is_operator(node.target):
        return f"{node.target.namespace}.{operator_name(node)}"
    return "F.linear" if node.target is F.linear else operator_name(node)


def operator_key(node: fx.Node) -> Any:
    """Returns the key of a node's operator in `Pattern.operators`: a function, or the name of a method.

    The key of a registered operator is its full name, "aten.bmm.default", which is known before its library is loaded.
    """
    if is_operator(node.target):
        return str(node.target)
    return f"{node.target}.default" if is_packet(node.target) else node.target


def operator_name(node: fx.Node) -> str:
    """Returns the name of a node's operator without namespace and overload: "transpose", however it is called.

    Other nodes get no operator's name: the call of a child `norm` is "norm()", an input is "placeholder".
    """
    if node.op not in CALLS:
        return f"{node.target}()" if node.op == "call_module" else node.op
    if is_operator(node.target):
        return node.target.overloadpacket.__name__
    if node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "__name__", node.target))
