"""What the matcher gives: one call of a linear in a graph; and how nodes are read."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from melora_fx.capture.packed import is_packed_linear, packed_weight
from melora_fx.names import get_attribute
from melora_fx.torch_private import is_operator

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


def weight_of(module: nn.Module, path: str) -> torch.Tensor:
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
    return "F.linear" if node.target in LINEAR else operator_name(node)


def operator_name(node: fx.Node) -> str:
    """A node's operator without its namespace and overload: "transpose", for each way to call it."""
    if is_operator(node.target):
        return node.target.overloadpacket.__name__
    if node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "__name__", node.target))


LINEAR = {F.linear, aten.linear.default}
