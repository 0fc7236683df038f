"""What the matchers give: one call of a linear in a graph; and how nodes are read."""

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
"""What `node.op` is of nodes that call an operator."""


KNOWN_SHAPE = "melora_shape"
"""Key in `node.meta` of an input whose shape is known: of a product that a module computes by itself."""


class Pattern(NamedTuple):
    """One way in which graphs multiply by a parameter, and how an adapter goes beside it.

    Attributes:
        operators: what `operator_key` gives for the nodes that may be one.
        match: what is multiplied by which parameter, or None for a node that only looks like a linear; the module is
            the one whose parameters the graph's `get_attr` nodes name.
        insert: adds an adapter's nodes behind such a node, given the weight.
        is_aten: whether these nodes are ATen alone, which forward-mode derivatives and ONNX need.
    """

    operators: Set[Any]
    match: Callable[[fx.Node, nn.Module], "LinearNode | None"]
    insert: Callable[[fx.Graph, "LinearNode", SiteRecord, Tensor], None]
    is_aten: bool = True


class Operands(NamedTuple):
    """What `F.linear` would take for the same bits.

    `weight`: None for a packed linear, whose own forward alone can read it. `is_flipped`: the weight is stored as
    (in_features, out_features).
    """

    weight: fx.Node | None
    bias: fx.Node | None
    is_flipped: bool = False


@dataclass(frozen=True)
class LinearNode:
    """One call of a linear in a graph: a product with a matrix, or with a stack of matrices, the experts of a mixture.

    Attributes:
        pattern: what a report calls it.
        weight_is_transposed: the parameter is stored (in_features, out_features), as in `Conv1D`.
        rows: (start, stop) of the outputs where the node multiplies by a part of the parameter; None for all.
        columns: the same of the inputs.
        input_is_transposed: the product is W @ x, so input and output are (…, features, tokens).
        orders: where other dimensions than the last are the features; None where the last ones are.
        scale: what the product is multiplied by, the `alpha` of `addmm`.
        weight_is_cast: the parameter is cast on the way, so input and parameter may have different dtypes.
        operands: what `F.linear` would take; None where it cannot give the same bits from the whole weight.
        choice: of a stack, the experts of the rows (S,), or the ends of their groups (E,).
        gather: of a stack, the node that gathers each row's matrix; None where none does.
        row_dims: of one matrix that is stored in three dimensions, how many of these are its rows; else None.
        matched_by: the entry of PATTERNS that found it.
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
    """The parameter at `path` below `module`; of a packed linear what stands for it."""
    owner = get_attribute(module, path.rpartition(".")[0])
    return packed_weight(owner) if is_packed_linear(owner) else get_attribute(module, path)


def parameter_of(value: Any, owner: nn.Module, *, dim: int) -> nn.Parameter | None:
    """The parameter of `dim` dimensions that a `get_attr` node gives, or None."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    parameter = get_attribute(owner, str(value.target))
    return parameter if isinstance(parameter, nn.Parameter) and parameter.dim() == dim else None


def argument(node: fx.Node, index: int, *names: str) -> Any:
    """The argument at a position or under one of its names; None where it is not given."""
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def pattern_name(node: fx.Node) -> str:
    """What a report calls the node's operator: "F.linear", "aten.bmm", …"""
    if is_operator(node.target):
        return f"{node.target.namespace}.{operator_name(node)}"
    return "F.linear" if node.target is F.linear else operator_name(node)


def operator_key(node: fx.Node) -> Any:
    """What `Pattern.operators` calls a node's operator: a function, or the name of a method; a registered operator goes
    by its full name, "aten.bmm.default", which it has before its library is loaded.
    """
    if is_operator(node.target):
        return str(node.target)
    return f"{node.target}.default" if is_packet(node.target) else node.target


def operator_name(node: fx.Node) -> str:
    """A node's operator without its namespace and overload: "transpose", for each way to call it.

    What calls none has no operator's name: an input, or a child `norm`, which is "norm()".
    """
    if node.op not in CALLS:
        return f"{node.target}()" if node.op == "call_module" else node.op
    if is_operator(node.target):
        return node.target.overloadpacket.__name__
    if node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "__name__", node.target))
