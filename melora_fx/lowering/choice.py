"""Which lowering a site gets, and why it cannot have another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from melora_fx.capture.packed import is_packed_linear
from melora_fx.config import MELoRAConfig
from melora_fx.names import get_attribute
from melora_fx.patterns.node import LINEAR, LinearNode, argument, operator_name
from melora_fx.patterns.views import CASTS

from .cost import WIDE
from .quantized_gradient import passes_gradient


def choose_lowering(config: MELoRAConfig, weight: Tensor, nodes: Sequence[LinearNode], owner: nn.Module) -> str:
    """The lowering of the site whose `weight` the `nodes` multiply by; `owner` holds the parameters of their graph.

    "plain" if one of the nodes cannot be written as `F.linear`, and otherwise what the configuration says. There "auto"
    means "weight" for weights of 32 bits or more without dropout, and "activation" for all others. A stack of matrices
    is always "activation".
    """
    if config.lowering == "plain" or not (_are_linears(nodes, owner) or _are_groups(nodes)):
        return "plain"
    if _are_groups(nodes):
        return "activation"
    if config.lowering != "auto":
        return config.lowering
    return "weight" if _can_be_merged(weight) and not config.dropout else "activation"


def lowering_misfit(config: MELoRAConfig, weight: Tensor, nodes: Sequence[LinearNode], owner: nn.Module) -> str | None:
    """Why the site cannot have the lowering that its configuration names, or None; arguments as before."""
    if config.lowering == "plain" and not passes_gradient(weight):
        return f"`lowering` (='plain') gives no gradient to what is below this {type(weight).__name__}: use 'auto'"
    if config.lowering in ("auto", "plain") or (config.lowering == "activation" and _are_groups(nodes)):
        return None
    if not _are_linears(nodes, owner):
        return f"`lowering` (={config.lowering!r}) needs a linear that is an `F.linear` of the whole weight: use 'auto'"
    if config.lowering == "weight" and not _can_be_merged(weight):
        kind = f"{type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
        return f"`lowering` (='weight') would round W + Δ to this {kind} in every step: use 'auto' or 'activation'"
    return None


class Operands(NamedTuple):
    """What `F.linear` would take for the same output. `is_flipped`: the weight is stored as (I, O)."""

    weight: fx.Node
    bias: fx.Node | None
    is_flipped: bool


def operands_of(linear: LinearNode, owner: nn.Module) -> Operands | None:
    """The operands of `F.linear` for the same bits, or None if it cannot compute them from the whole weight."""
    node = linear.node
    if linear.rows is not None or linear.input_is_transposed:
        return None
    if node.target in LINEAR:
        bias = argument(node, 2, "bias")
        return Operands(argument(node, 1, "weight"), bias, False) if _is_vector(bias, owner) else None
    name = operator_name(node)
    if name == "addmm" and node.kwargs.get("beta", 1) == 1:
        bias = argument(node, 0, "input", "self")
        return Operands(argument(node, 2, "mat2"), bias, True) if _is_vector(bias, owner) else None
    if name in ("mm", "matmul"):
        right = argument(node, 1, "mat2", "other", "tensor2")
        is_view = right.op != "get_attr" and operator_name(right) in ("t", "T", "mT", "numpy_T", "transpose")
        if (right.args[0] if is_view else right).op == "get_attr":
            return Operands(right, None, True)
    return None


def _is_vector(bias: Any, owner: nn.Module) -> bool:
    """Whether a bias is absent, or a parameter of one dimension, cast or not."""
    while isinstance(bias, fx.Node) and bias.op != "get_attr" and operator_name(bias) in CASTS:
        bias = bias.args[0]
    return bias is None or getattr(get_attribute(owner, str(bias.target)), "ndim", None) == 1


def _are_linears(nodes: Sequence[LinearNode], owner: nn.Module) -> bool:
    """Whether `adapted_linear` can run all of them: each is an `F.linear`, or the owner is a packed linear."""
    return is_packed_linear(owner) or all(operands_of(linear, owner) for linear in nodes)


def _are_groups(nodes: Sequence[LinearNode]) -> bool:
    """Whether all are products with a stack by transformers' own operator."""
    return all(operator_name(linear.node) == "grouped_mm_fallback" for linear in nodes)


def _can_be_merged(weight: Tensor) -> bool:
    """Whether W + Δ can be computed without rounding it to fewer than 32 bits."""
    return type(weight) is nn.Parameter and weight.dtype in WIDE
